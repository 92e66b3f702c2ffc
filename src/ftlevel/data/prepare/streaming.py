"""Prepare a streamed run, index the rows for `Trainer`, and order rows by seed and epoch.

The first rows determine the columns, the types and the length. Row numbers in the run serve as
indices, so `Trainer` skips rows on resume without reading them. The length grouping of `Trainer`
uses a generator that checkpoints do not store, so a run resumed within an epoch would continue with
other rows; the orders here depend only on the seed and the epoch.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from ftlevel.artifacts.files import read_json, rows_fingerprint, sampled_fingerprint
from ftlevel.config import DataConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.store import RowStore, rows_to_batches, write_store
from ftlevel.data.prepare.encoder import EncodingContext, PreparedData, ignore_progress
from ftlevel.data.prepare.loading import convert_splits, encode_data
from ftlevel.data.prepare.row_stream import ChunkEncoder, RowStream, StreamState
from ftlevel.data.sources.readers import ReadOptions
from ftlevel.data.sources.splits import DatasetSplits, StreamSource, open_source
from ftlevel.data.sources.streams import describe_null_keys
from ftlevel.data.sources.table import (
    BadRow,
    Part,
    Row,
    RowSchema,
    get_inconsistent_rows,
    handle_bad_rows,
)
from ftlevel.errors import ConfigError, InputError
from ftlevel.safe_io import save_text

POOL = 50
"""Number of steps whose rows are sorted together."""

LOOKAHEAD = 10_000
"""Maximum number of rows with repeated texts to skip while filling a step."""


class LengthGroupedSampler(Sampler[int]):
    """Sampler that groups rows of similar length into optimizer steps, in random order.

    `lengths` are in tokens; `step` is the number of rows per step. Set `epoch` (from 0) before the
    first row of an epoch is read.
    """

    def __init__(self, lengths: Sequence[int], step: int, seed: int) -> None:
        self.epoch = 0
        self._lengths = lengths
        self._step = step
        self._seed = seed

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        rows = torch.randperm(len(self), generator=generator).tolist()
        steps: list[list[int]] = []
        for start in range(0, len(rows), POOL * self._step):
            pool = sorted(rows[start : start + POOL * self._step], key=self._lengths.__getitem__)
            steps += [pool[i : i + self._step] for i in range(0, len(pool), self._step)]
        whole = [step for step in steps if len(step) == self._step]
        rest = [step for step in steps if len(step) < self._step]
        for index in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[index]
        for step in rest:
            yield from step


class DistinctTextSampler(Sampler[int]):
    """Sampler in random order; no text occurs in two rows of an optimizer step.

    The rows of a step are consecutive. Rows that fit into no step are in the last steps; `repeated`
    counts them. Set `epoch` (from 0) before the first row of an epoch is read. Texts are compared
    only if `is_distinct`.

    If `sets` has the dataset of each row, all rows of a step are from one dataset. Datasets are
    chosen at random, in proportion to their steps. Short steps end with padding rows, whose index
    is the number of rows.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        step: int,
        seed: int,
        sets: Sequence[int] = (),
        *,
        is_distinct: bool = True,
    ) -> None:
        self.epoch = 0
        self.repeated = 0
        self._step, self._seed, self._sets = step, seed, sets
        text_ids: dict[tuple[int, ...], int] = {}
        self._texts = [
            {text_ids.setdefault(tuple(text.input_ids), len(text_ids)) for text in row.sequences}
            if is_distinct
            else set()
            for row in rows
        ]

    def __len__(self) -> int:
        return count_padded_rows(self._sets, self._step) if self._sets else len(self._texts)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        order = torch.randperm(len(self._texts), generator=generator).tolist()
        self.repeated = 0
        if not self._sets:
            for step in self._split(order):
                yield from step
            return
        left: dict[int, list[int]] = {}
        for row in order:
            left.setdefault(self._sets[row], []).append(row)
        steps = {number: list(self._split(rows)) for number, rows in sorted(left.items())}
        turns = [number for number, own in steps.items() for _ in own]
        for at in torch.randperm(len(turns), generator=generator).tolist():
            step = steps[turns[at]].pop(0)
            yield from step
            yield from [len(self._texts)] * (self._step - len(step))

    def _split(self, order: list[int]) -> Iterator[list[int]]:
        """Yields the rows of each step, chosen in order from the rows `order`."""
        left, limit = deque(order), max(LOOKAHEAD, self._step)
        while left:
            used: set[int] = set()
            chosen: list[int] = []
            later: list[int] = []
            while left and len(chosen) < self._step and len(later) < limit:
                row = left.popleft()
                if used.isdisjoint(self._texts[row]):
                    used |= self._texts[row]
                    chosen.append(row)
                else:
                    later.append(row)
            if len(chosen) < self._step:  # only rows with repeated texts are left or near
                more = later[: self._step - len(chosen)]
                later = later[len(more) :]
                self.repeated += len(more)
                chosen += more
            yield chosen
            left.extendleft(reversed(later))


def count_padded_rows(sets: Sequence[int], step: int) -> int:
    """Returns the rows per epoch, padded to full steps per dataset; `sets`: dataset of each row."""
    return sum(math.ceil(size / step) * step for size in Counter(sets).values())


class StepShardSampler(Sampler[list[int]]):
    """Batch sampler of one process, if several processes share each optimizer step.

    A step has `batch * num_processes` consecutive rows of `order`. With `lengths`, the tokens of
    each row, a step's rows are divided so that all processes have about equally many tokens: the
    longest row goes first, to the process with the fewest tokens. Without them, each process has
    `batch` consecutive rows.

    All processes have equally many batches: if a step has no row for a process, its batch is one
    padding row, whose index is the number of rows; accelerate would repeat rows from the beginning
    of the epoch.
    """

    def __init__(
        self,
        order: Sampler[int],
        batch: int,
        num_processes: int,
        rank: int,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self._order, self._batch, self._count, self._rank = order, batch, num_processes, rank
        self._lengths = lengths

    def __len__(self) -> int:
        rows = len(self._order)  # type: ignore[arg-type]  # all samplers used here have a length
        return math.ceil(rows / (self._batch * self._count))

    def __iter__(self) -> Iterator[list[int]]:
        rows, step_size = list(self._order), self._batch * self._count
        for start in range(0, len(rows), step_size):
            step = rows[start : start + step_size]
            if self._lengths is None:
                begin = self._rank * self._batch
                share = step[begin : begin + self._batch]
            else:  # an order may have padding rows, too
                step = [row for row in step if row < len(self._lengths)]
                lengths = [int(self._lengths[row]) for row in step]
                share = [step[at] for at in divide_evenly(lengths, self._count)[self._rank]]
            yield share or [len(rows)]


def divide_evenly(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Divide items into `count` parts of about equal size; returns the sorted indices of each.

    Items are assigned from the largest to the smallest, each to the part that is smallest so far.
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    smallest = [(0, 0, number) for number in range(count)]  # a heap: size, items, part
    for at in sorted(range(len(sizes)), key=lambda at: -sizes[at]):
        size, items, number = smallest[0]
        parts[number].append(at)
        heapq.heapreplace(smallest, (size + sizes[at], items + 1, number))
    return [sorted(part) for part in parts]


class RowsWithPadding(Dataset[Encoded]):
    """`rows` and, last, a padding row: a copy of the first row that adds nothing to the loss."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows) + 1

    def __getitem__(self, index: int) -> Encoded:
        if index < len(self.rows):
            return self.rows[index]
        return replace(self.rows[0], row=-1)


SAMPLE = 1_000
"""Number of training rows used to detect lengths, columns and types."""

WHOLE_SET = (
    "exact_duplicates",
    "near_duplicates",
    "conflicting_answers",
    "swapped_roles",
    "one_answer",
    "leaked",
    "near_leaked",
)
"""Checks that compare rows, and so cover only the first rows of a stream."""


def read_first_rows(config: DataConfig) -> DatasetSplits:
    """Returns the validation rows and the first training rows of a stream."""
    return _read_head(_open(config), config)[0]


def _open(config: DataConfig) -> StreamSource:
    options = ReadOptions(
        config.input_format,
        config.subset,
        ignored=config.ignore_columns,
        limit=config.max_eval_samples,
    )
    return open_source(
        config.dataset, split=config.split, on_bad_row=config.on_bad_row, options=options
    )


def prepare_stream(config: DataConfig, context: EncodingContext) -> PreparedData:
    """Returns `PreparedData` with the first rows, encoded and checked, and the `stream` of all."""
    source = _open(config)
    splits, schema = _read_head(source, config)
    data = convert_splits(splits, config, context.task, lenient=context.lenient)
    prepared = encode_data(data, config, context, None, ignore_progress)
    length, overlong = prepared.max_length, prepared.info["overlong"]
    if config.max_length == "auto":
        roomy, bound = length + length // 4, context.bounds.tightest[0]
        length = roomy if bound is None else max(length, min(roomy, bound))
    may_drop = config.max_length == "auto" and overlong == "error"
    resolved = config.model_copy(
        update={"max_length": length, "overlong": "drop" if may_drop else overlong}
    )
    encoder = context.encoder(resolved, prepared.prompt_format, partly=True)
    stream = RowStream(
        source.train,
        ChunkEncoder(resolved, data.format, schema, encoder, context.gate(config.gate), may_drop),
        config.validation_rows or 0,
        config.shuffle_buffer,
        context.seed,
        source.files,
    )
    data_info = {
        **prepared.info,
        "streamed": True,
        "first_rows": len(prepared.train),
        "max_length": length,
        "fingerprint": _fingerprint(source, splits.train.rows),
    }
    partial = [name for name in WHOLE_SET if getattr(config.gate, name) != "ignore"]
    reason = f"{', '.join(partial)} checked in the first rows only"
    checks = Choice("data check", "each row as it comes", reason if partial else "")
    choices = [*_choices(prepared, config, length), checks]
    return replace(prepared, stream=stream, max_length=length, info=data_info, choices=choices)


def _read_head(source: StreamSource, config: DataConfig) -> tuple[DatasetSplits, RowSchema]:
    num_samples = config.validation_rows or 0
    if num_samples and source.validation is not None:
        raise InputError(
            f"data.validation_rows={num_samples:,}: {config.dataset} has its own validation rows. "
            "Drop it."
        )
    rows: list[Row] = []
    lines: list[int] = []
    errors: list[BadRow] = []
    parts: list[Part] = []  # one per file
    total, base = SAMPLE + num_samples, 0
    chunk = None
    for chunk in source.train.chunks():
        if not parts or parts[-1].table.source != chunk.source:
            base = max([*lines, *(row.line for row in errors)], default=0)
            parts.append(Part(base, chunk.table))
        rows += chunk.rows
        lines += [base + line for line in chunk.lines]
        errors += [replace(row, line=base + row.line) for row in chunk.errors]
        if len(rows) >= total:
            errors = [row for row in errors if row.line <= lines[total - 1]]
            break
    if chunk is None or not (rows or errors):
        raise InputError(f"{config.dataset}: has 0 rows. Use a dataset with rows.")
    if num_samples and len(rows) <= num_samples:
        raise InputError(
            f"data.validation_rows={num_samples:,} leaves none of the {len(rows):,} rows of "
            f"{config.dataset} to train on. Hold out fewer."
        )
    table = replace(chunk.table, rows=rows[:total], lines=lines[:total], ignored=source.ignored)
    table = replace(table, parts=tuple(parts) if len(parts) > 1 else ())
    table = table.without_columns(config.ignore_columns)
    inconsistent = get_inconsistent_rows(table.rows, table.lines)
    schema = RowSchema.of(table.rows, table.lines)
    eval_table = source.validation
    if num_samples:
        eval_table = table.take(range(num_samples))
        odd = [row for row in inconsistent if row.line in set(eval_table.lines)]
        eval_table = handle_bad_rows(eval_table, odd, config.on_bad_row)
        eval_table = eval_table.head(config.max_eval_samples or num_samples)
    train = table.take(range(num_samples, len(table))) if num_samples else table
    errors += [row for row in inconsistent if row.line in set(train.lines)]
    train = handle_bad_rows(train, errors, config.on_bad_row)
    notes = [*source.notes, *describe_null_keys(source.train.null_keys, chunk.source)]
    if num_samples:
        notes.append(f"validation: the first {num_samples:,} rows, which are not trained on")
    return DatasetSplits(train, eval_table, None, config.dataset, notes), schema


def _fingerprint(source: StreamSource, rows: Any) -> str:
    digest = hashlib.sha256(rows_fingerprint(rows).encode())
    for file in source.files:
        digest.update(sampled_fingerprint(Path(file)).encode())
    return digest.hexdigest()


def _choices(prepared: PreparedData, config: DataConfig, length: int) -> list[Choice]:
    first = f"the first {prepared.info['train_rows']:,} rows"
    held_out = (
        f"{len(prepared.validation):,} for validation"
        if prepared.validation
        else "no validation rows: --set data.validation_rows=N holds some out"
    )
    shuffle = (
        f"shuffled within {config.shuffle_buffer:,} rows"
        if config.shuffle_buffer > 1
        else "in the set's order"
    )
    lines = []
    for choice in prepared.choices:
        if choice.name == "data":
            lines.append(
                Choice("data", f"{choice.value}, read as it comes", f"{shuffle}; {held_out}")
            )
        elif choice.name == "tokens":
            lines.append(Choice("tokens", f"{prepared.info['tokens']:,} in {first}", choice.reason))
        elif choice.name == "max length" and config.max_length == "auto":
            reason = f"auto: a quarter more than the longest of {first}, {prepared.max_length:,}"
            if config.overlong == "error":
                reason += "; a longer one is dropped, up to 1 % of the rows"
            lines.append(Choice(choice.name, f"{length:,} tokens", reason))
        else:
            lines.append(choice)
    return lines


_STATE, _ROWS = "stream.json", "stream.arrow"
_RECENT = 8  # steps: the data loader reads a batch or two ahead


class StreamedRows:
    """Rows of a streamed run, to be read in order; a step has `step` rows over all processes.

    Each process reads every row of the stream, `together` at a time (a micro-batch of all
    processes), and returns only its own.
    """

    def __init__(self, stream: RowStream, step: int, steps: int, together: int = 1) -> None:
        self._stream, self._step, self._steps = stream, step, steps
        self._together, self._latest = together, deque[Encoded](maxlen=together)
        self._next = 0
        self._states: dict[int, StreamState] = {}  # by step

    def __len__(self) -> int:
        return self._step * self._steps

    def __getitem__(self, index: int) -> Encoded:
        """Returns row `index`, skipping rows of other processes; `IndexError` if already read."""
        if index < self._next - self._together:
            raise IndexError(f"row {index:,} of a stream was taken; the next is {self._next:,}")
        while index >= self._next:
            for _ in range(self._together):
                if self._next % self._step == 0:
                    self._states[self._next // self._step] = self._stream.state()
                    if len(self._states) > _RECENT:
                        del self._states[next(iter(self._states))]
                self._latest.append(next(self._stream))
                self._next += 1
        return self._latest[index - self._next]

    @property
    def counts(self) -> dict[str, int]:
        """Counts of rows read, dropped and changed."""
        return self._stream.counts

    def save(self, folder: Path, step: int) -> None:
        """Write the stream state after optimizer step `step` to `folder`.

        The data loader may already have read rows of later steps.
        """
        at_the_end = self._next == step * self._step
        state = self._stream.state() if at_the_end else self._states[step]
        rows = [*state.waiting, *state.buffered]
        if rows:
            write_store(folder / _ROWS, rows_to_batches(rows))
        content = {"step": step, **vars(state), "waiting": len(state.waiting)}
        del content["buffered"]
        save_text(folder / _STATE, json.dumps(content))

    def restore(self, folder: Path) -> None:
        """Resume from the state in `folder`; raise `ConfigError` if there is none."""
        if not (folder / _STATE).is_file():
            raise ConfigError(
                f"--resume: {folder} has no {_STATE}, so it is not of a streamed run. Start it "
                "again with --overwrite."
            )
        content: dict[str, Any] = read_json(folder / _STATE)
        path, waiting = folder / _ROWS, content["waiting"]
        rows = tuple(RowStore(path)) if path.is_file() else ()
        self._next = content.pop("step") * self._step
        buffers = {"waiting": rows[:waiting], "buffered": rows[waiting:]}
        self._stream.set_state(StreamState(**{**content, **buffers}))
