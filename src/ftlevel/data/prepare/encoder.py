"""Encode examples with the tokenizer of a run, in one or more processes, into memory or a store."""

from __future__ import annotations

import multiprocessing
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pyarrow as pa  # type: ignore[import-untyped]

from ftlevel.config import DataConfig, GateConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.chat import list_special_tokens
from ftlevel.data.encoding.fit import (
    FittedRows,
    LengthBounds,
    check_not_empty,
    fit_rows,
    fit_targets,
)
from ftlevel.data.encoding.prompts import PromptFormat
from ftlevel.data.encoding.row import Encoded, RowError
from ftlevel.data.encoding.store import RowStore, to_batch, write_store
from ftlevel.data.formats.detect import Format, FormatSpec, detect_format
from ftlevel.data.formats.labels import LabelSet
from ftlevel.data.gate import Finding
from ftlevel.data.gate.checks import TextCheckContext, TokenCheckContext, get_empty_think_ids
from ftlevel.data.gate.gate import CheckedTask, Gate, special_token_ids
from ftlevel.data.gate.similarity import Digests, words_path
from ftlevel.data.sources.splits import DatasetSplits
from ftlevel.data.sources.table import BadRow, Row, Table
from ftlevel.errors import ConfigError, InputError
from ftlevel.safe_io import open_new


@dataclass(frozen=True, kw_only=True)
class DataTask(CheckedTask, ABC):
    """Base class of tasks: the part that turns columns into encoded rows.

    Attributes:
        name: value of `--task`.
        shapes: supported column layouts; the first that matches is used.
        instruction: text before the source text in prompts; empty for none.
        answer_cue: end of the prompt for models without a chat template.
        builtin_subset: subset of `builtin:docstrings` to read; empty for all.
        needs_offsets: whether encoding needs the character offsets of tokens.
        split_text: what the log calls the rows that were added by splitting long examples.
    """

    name: str
    shapes: tuple[FormatSpec, ...]
    instruction: str = ""
    answer_cue: str = ""
    builtin_subset: str = ""

    needs_offsets: ClassVar[bool] = False
    split_text: ClassVar[str] = "split into several"

    # ruff: disable[ARG002] - for subclasses
    @property
    def encoding_config(self) -> Mapping[str, Any]:
        """Options that change encoded rows, besides the config's data section; for cache keys."""
        return {}

    def get_format(
        self, column_names: Sequence[str], config: DataConfig, rows: Sequence[Row] = ()
    ) -> Format:
        """Returns the format of a table; raises `NoFormatError` if none fits."""
        mapping = {**self.column_mapping(column_names, config, rows), **config.columns}
        return detect_format(column_names, self.name, self.shapes, mapping, config.format, rows)

    def column_mapping(
        self, column_names: Sequence[str], config: DataConfig, rows: Sequence[Row]
    ) -> Mapping[str, str]:
        """Returns role -> column (e.g. source -> en) that the task itself finds, not `--map`."""
        return {}

    def update_format(
        self, format_: Format, table: Table, config: DataConfig
    ) -> tuple[Format, list[Choice]]:
        """Returns `format_` completed by the values of `table` and by `config`, and log lines."""
        return format_, []

    def options_for_rows(
        self, options: Mapping[str, Any], examples: Sequence[Any]
    ) -> Mapping[str, Any]:
        """Returns the `options` of a model card, updated for the `examples` to evaluate."""
        return options

    def label_role(self, format_: Format) -> str | None:
        """Returns the role (column of a layout) whose values are class labels, or None."""
        return None

    def get_inconsistent_labels(
        self, examples: Sequence[Any], labels: LabelSet, table: Table
    ) -> list[BadRow]:
        """Returns a `BadRow` per row with contradicting labels, such as I-LOC after B-PER."""
        return []

    def prompt_format(self, format_: Format, kind: str, tokenizer: Any) -> PromptFormat | None:
        """Returns the prompt format for models of `kind`, or None for tasks without prompts."""
        return None

    @abstractmethod
    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> FittedRows:
        """Encode `examples`, and apply the maximum length; `table` locates rows in messages."""

    def list_files(self, config: DataConfig) -> list[Path]:
        """Returns the files that `with_corpus` reads and the configuration does not name."""
        return []

    def with_corpus(self, splits: DatasetSplits, config: DataConfig) -> DatasetSplits:
        """Returns `splits` with the validation rows of `qrels` and with the documents to search."""
        raise ConfigError(f"--corpus: not for --task {self.name}. Drop it.")

    def encode_corpus(
        self, encoder: Encoder, documents: Sequence[str]
    ) -> tuple[Sequence[Encoded], Choice]:
        """Returns the encoded documents to search, and a log line; ConfigError if unsupported."""
        raise ConfigError(f"--corpus: not for --task {self.name}. Drop it.")

    def data_info(self, loaded: Any) -> Mapping[str, Any]:
        """Returns the task's entries about the data in summary.json."""
        return {}

    def describe_rows(self, loaded: Any, data_info: Mapping[str, Any]) -> list[Choice]:
        """Returns log lines with the number of training targets."""
        tokens, supervised = data_info["tokens"], data_info["supervised"]
        share = f"{supervised:,} supervised, {supervised / tokens:.0%}"
        return [Choice("tokens", f"{tokens:,} an epoch", share)]

    def finish_data(
        self, prepared: PreparedData, config: DataConfig, context: EncodingContext
    ) -> PreparedData:
        """Returns `prepared` with rows completed by the task, e.g. masked anew at each access."""
        return prepared

    def evaluation_rows(
        self, rows: Sequence[Encoded], config: DataConfig, context: EncodingContext
    ) -> Sequence[Encoded]:
        """Returns `rows` for evaluation, which are equal at each access, e.g. with fixed masks."""
        return rows

    # ruff: enable[ARG002]


@dataclass(frozen=True)
class EncodingContext:
    """Everything that affects the rows, except the configuration's data section.

    Attributes:
        vocabulary: number of rows of the embedding.
        bounds: bounds on the row length, after subtracting the method's virtual tokens.
        lenient: drop and report rows that would stop the run, as in a preview.
    """

    task: DataTask
    kind: str
    tokenizer: Any
    vocabulary: int
    bounds: LengthBounds
    seed: int
    lenient: bool = False

    def encoder(
        self, config: DataConfig, prompt_format: PromptFormat | None, **options: Any
    ) -> Encoder:
        """Returns an `Encoder` with these settings; `options` are its remaining fields."""
        return Encoder(
            self.task, self.kind, self.tokenizer, config, self.bounds, prompt_format, **options
        )

    def gate(self, policy: GateConfig) -> Gate:
        """Returns a `Gate` that runs the data checks, with the actions of `policy`."""
        tokenizer = self.tokenizer
        checks = TokenCheckContext(
            self.task.checks,
            tokenizer.bos_token_id,
            special_token_ids(tokenizer),
            self.vocabulary,
            get_empty_think_ids(tokenizer),
        )
        return Gate(policy, self.task, checks)


@dataclass(frozen=True)
class PreparedData:
    """Rows ready for the model.

    Attributes:
        train: encoded training rows.
        table: training rows as read, indexed by `Encoded.row`.
        info: data section of `summary.json`.
        choices: log lines.
        corpus: documents that validation queries search; if empty, those of the validation rows.
        sets: dataset index of each training row, if no step mixes datasets; else empty.
        workspace: temporary directory of uncached rows, deleted with this object.
        validation_table: locations of the validation rows; it has no rows.
    """

    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    prompt_format: PromptFormat | None
    max_length: int
    table: Table
    info: dict[str, Any]
    choices: list[Choice]
    findings: tuple[Finding, ...] = ()
    corpus: Sequence[Encoded] = ()
    sets: Sequence[int] = ()
    workspace: Any = None
    validation_table: Table = field(default_factory=lambda: Table([], [], ""))


T = TypeVar("T")
BATCH = 1_000  # examples
Encode = Callable[[Sequence[Any]], list[Encoded]]
Progress = Callable[[int, int], None]
"""Callback with the number of finished examples and their total."""


def ignore_progress(done: int, total: int) -> None:
    """Progress callback that does nothing."""


_job: tuple[Encode, Sequence[Any], TextCheckContext] | None = None  # inherited by forked processes


def encode_to_store(
    path: Path,
    encode: Encode,
    examples: Sequence[Any],
    context: TextCheckContext,
    processes: int,
    progress: Progress,
) -> RowStore:
    """Encode `examples` in batches and write the rows to `path` in order.

    Digests are written to `digests_path(path)`. Uses `processes` processes if fork is available.
    Raises `ValueError` if no example produced a row.
    """
    global _job
    positions = range(0, len(examples), BATCH)
    digests = digests_path(path)
    _job = (encode, examples, context)
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(open_new(p, "wb")) for p in (digests, words_path(digests))]
            parts: Iterator[tuple[pa.RecordBatch | None, tuple[bytes, bytes]]]
            if processes > 1 and "fork" in multiprocessing.get_all_start_methods():
                fork = multiprocessing.get_context("fork")
                pool = stack.enter_context(fork.Pool(processes, _disable_tokenizer_threads))
                parts = pool.imap(_encode_batch, positions)
            else:
                parts = map(_encode_batch, positions)

            def batches() -> Iterator[pa.RecordBatch]:
                for start, (batch, contents) in zip(positions, parts, strict=True):
                    progress(min(start + BATCH, len(examples)), len(examples))
                    for file, content in zip(files, contents, strict=True):
                        file.write(content)
                    if batch is not None:
                        yield batch

            return write_store(path, batches())
    finally:
        _job = None


def digests_path(path: Path) -> Path:
    """Returns the path of the file with the `Digests` of the rows at `path`."""
    return path.with_suffix(".digests")


def _disable_tokenizer_threads() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _encode_batch(start: int) -> tuple[pa.RecordBatch | None, tuple[bytes, bytes]]:
    if _job is None:
        raise RuntimeError("there is no job")
    encode, examples, context = _job
    batch = examples[start : start + BATCH]
    rows = encode(batch)
    return to_batch(rows) if rows else None, Digests.of(batch, context).to_bytes()


_SLOW_CHARACTERS = 1_000_000  # characters that take seconds to encode


@dataclass(frozen=True)
class Encoder:
    """Encoder of the examples of one split for a task.

    Attributes:
        folder: directory for the rows; None stores them in memory.
        lenient: whether to drop and report rows that would stop the run.
        split: name of the split and of its files.
        ignore_max_length: whether to ignore the configured length and use `bounds` only.
    """

    task: DataTask
    kind: str
    tokenizer: Any
    config: DataConfig
    bounds: LengthBounds
    prompt_format: PromptFormat | None = None
    labels: LabelSet | None = None
    folder: Path | None = None
    progress: Progress = ignore_progress
    lenient: bool = False
    split: str = "train"
    ignore_max_length: bool = False

    def __call__(self, examples: Sequence[Any], table: Table) -> FittedRows:
        """Returns the encoded `examples`; rows over the maximum length are handled as by `fit`."""
        if not self.tokenizer.is_fast and self.task.needs_offsets:
            raise InputError(
                f"the tokenizer of {self.tokenizer.name_or_path} does not provide character "
                f"offsets, which --task {self.task.name} needs. Use a model with a tokenizer.json."
            )
        try:
            fitted = self.task.encode(self, examples, table)
        except RowError as error:
            raise InputError(f"{table.where(error.row)}: {error.message}") from error
        return replace(fitted, digests=self._digests(examples))

    def for_held_out(self, split: str) -> Encoder:
        """Returns an encoder for a held-out `split`; long rows are dropped, split or truncated."""
        overlong = self.config.overlong
        overlong = overlong if overlong in ("split", "truncate") else "drop"
        if self.config.qrels is not None:  # all queries are searched for
            overlong = "truncate"
        config = self.config.model_copy(update={"overlong": overlong, "train_on_inputs": False})
        return replace(self, config=config, split=split)

    def within(self, limit: int | None) -> Encoder:
        """Returns an encoder that limits rows to `limit` tokens, unless a length is configured."""
        if limit is None or not (self.ignore_max_length or self.config.max_length == "auto"):
            return self
        positions = min(limit, self.bounds.positions or limit)
        return replace(self, bounds=replace(self.bounds, positions=positions))

    def digest(self, examples: Sequence[Any]) -> Digests:
        """Returns the `Digests` of `examples`: hashes that find duplicates, text-check results."""
        return Digests.of(examples, self._text_context)

    @property
    def _text_context(self) -> TextCheckContext:
        bos = self.tokenizer.bos_token
        return TextCheckContext((*list_special_tokens(self.tokenizer), *([bos] if bos else [])))

    def collect(self, encode: Encode, examples: Sequence[Any]) -> Sequence[Encoded]:
        """Encode all examples with `encode`, into a store if `folder` is set."""
        if self.folder is None:
            slow = any(len(example.key_text) > _SLOW_CHARACTERS for example in examples)
            progress = self.progress if slow else ignore_progress
            progress(0, len(examples))
            rows = encode(examples)
            progress(len(examples), len(examples))
            return rows
        path = self.folder / f"{self.split}.arrow"
        return encode_to_store(
            path, encode, examples, self._text_context, self.config.num_proc, self.progress
        )

    def _digests(self, examples: Sequence[Any]) -> Digests:
        path = self.folder and digests_path(self.folder / f"{self.split}.arrow")
        return Digests.at(path) if path and path.exists() else self.digest(examples)

    def fit(self, rows: Sequence[Encoded], table: Table) -> FittedRows:
        """Truncate, split or drop rows over the maximum length, or raise, by `config.overlong`."""
        length = "auto" if self.ignore_max_length else self.config.max_length
        fitted, stops = self._relax(
            lambda overlong: fit_rows(rows, length, self.bounds, overlong, table.where)
        )
        check_not_empty(fitted, rows)
        return replace(fitted, stops=stops)

    def _relax(self, function: Callable[[str], T]) -> tuple[T, str]:
        """Returns (`function(overlong)`, ""); on error, if lenient, (`function("drop")`, error)."""
        try:
            return function(self.config.overlong), ""
        except InputError as error:
            if not self.lenient:
                raise
            return function("drop"), str(error)

    def fit_targets(self, fitted: FittedRows, table: Table) -> FittedRows:
        """Drop rows whose target exceeds `max_target_length`, or raise, by `config.overlong`."""
        limit = self.config.max_target_length
        (rows, dropped), stops = self._relax(
            lambda overlong: fit_targets(fitted.rows, limit, overlong, table.where)
        )
        if not len(rows):
            raise InputError(f"no target is within {limit:,} tokens.")
        dropped += fitted.dropped
        return replace(fitted, rows=rows, dropped=dropped, stops=fitted.stops or stops)

    def limit(self, default: int | None) -> int | None:
        """Returns the configured maximum length, else the lower of `default` and `bounds`."""
        if isinstance(max_length := self.config.max_length, int):
            self.bounds.check(max_length)
            return max_length
        bounds = (default, self.bounds.tightest[0])
        return min((length for length in bounds if length is not None), default=None)
