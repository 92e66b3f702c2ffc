"""`preview`: show rows encoded as for `train`, their lengths, and findings of the data checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ftlevel.config import TrainConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.collate import MaskedRows
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.encoding.store import row_lengths
from ftlevel.data.gate import Finding
from ftlevel.data.gate.checks import flat_batches
from ftlevel.errors import ConfigError, join_names
from ftlevel.models.loading import silence_loggers
from ftlevel.training.plan.adapter import resolve_adapter
from ftlevel.training.plan.resolve import infer_task, resolve
from ftlevel.training.plan.run import Run

_BARS = 10  # of the histogram


@dataclass(frozen=True)
class Token:
    """Token of a row; `text` is what it adds to the text of the preceding tokens.

    `supervised` is whether the loss has this position as target; `label` is the target's text if
    it differs from `text`.
    """

    id: int
    text: str
    supervised: bool
    special: bool
    label: str = ""


@dataclass(frozen=True)
class ShownRow:
    """A row as the model sees it; `number` counts from 1 in the order of the files.

    `location` is `file:line`.

    `target` has the tokens of an encoder-decoder's target; `label` is the target of the whole row,
    or with `has_several_texts` the positions of its texts.
    """

    number: int
    location: str
    tokens: tuple[Token, ...]
    target: tuple[Token, ...]
    label: str
    has_several_texts: bool

    def to_dict(self) -> dict[str, Any]:
        """Returns the row for `--json`, where the location is `place`."""
        fields = asdict(self)
        return {"place": fields.pop("location"), **fields}


@dataclass(frozen=True)
class Bar:
    """Histogram bar: the number of rows with `begin` to `end` tokens, both inclusive."""

    begin: int
    end: int
    count: int


@dataclass(frozen=True)
class Preview:
    """Output of `preview`; `tokens` and `supervised` are per epoch, `lengths` is a histogram.

    `rollouts` has lines about sampled completions, in reinforcement learning.
    """

    rows: list[ShownRow]
    lengths: list[Bar]
    tokens: int
    supervised: int
    findings: list[Finding]
    steps: int
    data_info: dict[str, Any]
    choices: list[Choice]
    rollouts: list[Choice]

    def to_dict(self) -> dict[str, Any]:
        """Returns the output of `--json`."""
        return {
            "data": self.data_info,
            "rows": [row.to_dict() for row in self.rows],
            "lengths": [asdict(bar) for bar in self.lengths],
            "tokens": self.tokens,
            "supervised": self.supervised,
            "steps": self.steps,
            "findings": [finding.to_dict() for finding in self.findings],
            "rollouts": {choice.name: str(choice) for choice in self.rollouts},
        }


def preview(config: TrainConfig, numbers: Sequence[int] = ()) -> Preview:
    """Returns the data of `config` as the model sees it.

    `numbers` are 1-based rows to show; by default a short, a medium and a long one. Raises
    ConfigError if the data cannot be read, or a row does not exist.
    """
    with silence_loggers():
        config, adapter, _ = resolve_adapter(config)
        config, message = infer_task(config)
        run = resolve(config, lenient=True, why_task=message, adapter=adapter)
        rows = [_show_row(run, row) for row in _select_rows(run, numbers)]
        rollouts = run.hooks.preview(run)
    data_info = run.data.info
    return Preview(
        rows,
        build_histogram(_lengths(run)),
        data_info["tokens"],
        data_info["supervised"],
        list(run.data.findings),
        run.schedule.steps,
        data_info,
        run.data.choices,
        rollouts,
    )


def _select_rows(run: Run, numbers: Sequence[int]) -> list[Encoded]:
    rows = run.data.train
    if not numbers:
        order = sorted(range(len(rows)), key=_lengths(run).__getitem__)
        return [rows[i] for i in dict.fromkeys((order[0], order[len(order) // 2], order[-1]))]
    encoded = rows.rows if isinstance(rows, MaskedRows) else rows
    there = _row_numbers(run)[np.concatenate([flat.example for flat in flat_batches(encoded)])]
    missing = [number for number in numbers if number not in there]
    if missing:
        total = len(run.data.table.lines)
        message = "it was dropped, see the data checks" if missing[0] <= total else "no such row"
        raise ConfigError(
            f"--row {join_names(map(str, missing))}: {message}. There are {total:,} training rows, "
            f"of which {len(np.unique(there)):,} are trained on."
        )
    return [rows[i] for number in numbers for i in np.flatnonzero(there == number).tolist()]


def _row_numbers(run: Run) -> np.ndarray:
    """Returns the 1-based number of each row, in the order of the files that were interleaved."""
    table = run.data.table
    numbers = np.arange(1, len(table.lines) + 1)
    if table.parts:
        numbers[np.argsort(table.lines)] = numbers.copy()
    return numbers


def _lengths(run: Run) -> list[int]:
    rows = run.data.train
    lengths: list[int] = row_lengths(rows.rows if isinstance(rows, MaskedRows) else rows).tolist()
    return lengths


def _show_row(run: Run, row: Encoded) -> ShownRow:
    decoder = PieceDecoder(run.model.tokenizer)
    texts = decoder.decode_tokens(row.input_ids)
    names = run.data.info["labels"]
    learned = run.task.decode_targets(row, names, run.model.kind, decoder.decode_tokens)
    special = decoder.special
    tokens = tuple(
        Token(id_, text, label is not None, id_ in special, label or "")
        for id_, text, label in zip(row.input_ids, texts, learned, strict=True)
    )
    ids = run.task.get_decoder_labels(row, run.model.kind)
    target = tuple(
        Token(id_, text, True, id_ in special)
        for id_, text in zip(ids, decoder.decode_tokens(ids), strict=True)
    )
    location = run.data.table.where(row.row)
    label = run.task.decode_label(row, names)
    number = int(_row_numbers(run)[row.row])
    return ShownRow(number, location, tokens, target, label, row.has_several_texts)


class PieceDecoder:
    """Decodes token ids to the text that each adds after the preceding ones.

    Decoding ids one at a time would lose leading spaces and multi-byte characters.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = {i for i, token in added.items() if token.special}
        self.special |= set(tokenizer.all_special_ids)
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]

    def decode_tokens(self, ids: Sequence[int]) -> list[str]:
        """Returns the text of each id; a character of several ids belongs to the last of them."""
        before = self._decode(self._anchor)
        texts, pending = [], []
        for id_ in ids:
            pending.append(id_)
            text = self._decode([*self._anchor, *pending])
            whole = not text.endswith("\ufffd") or len(pending) > 3
            texts.append(text.removeprefix(before) if whole else "")
            pending = [] if whole else pending
        return texts

    def _decode(self, ids: Sequence[int]) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(ids, **options))


def build_histogram(lengths: Sequence[int]) -> list[Bar]:
    """Returns at most ten bars of equal width over the row lengths `lengths`."""
    if not lengths:
        return []
    shortest, longest = min(lengths), max(lengths)
    width = max(1, -(-(longest - shortest + 1) // _BARS))
    heights = np.bincount([(length - shortest) // width for length in lengths]).tolist()
    edges = range(shortest, longest + 1, width)
    return [Bar(s, min(s + width - 1, longest), c) for s, c in zip(edges, heights, strict=True)]
