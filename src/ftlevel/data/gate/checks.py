"""Checks of token ids and labels (on concatenated rows, returning a mask) and of single texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.data.encoding.store import RowStore
from ftlevel.data.formats.examples import ExampleContent
from ftlevel.objectives import Checks

_ROWS = 4_096
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Ragged:
    """Integers of several rows; row i is `values[starts[i]:starts[i + 1]]`."""

    values: NDArray[np.int32]
    starts: Integers

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Integers:
        """Number of values of each row."""
        return np.diff(self.starts)

    def count(self, mask: Mask) -> Integers:
        """Returns the number of true values of `mask` in each row."""
        total = np.concatenate(([0], np.cumsum(mask)))
        return total[self.starts[1:]] - total[self.starts[:-1]]

    def any(self, mask: Mask) -> Mask:
        """Returns for each row whether `mask` is true anywhere."""
        return self.count(mask) > 0


def to_ragged(rows: Iterable[Sequence[int]]) -> Ragged:
    """Returns lists of integers, such as token ids, as one `Ragged`."""
    rows = list(rows)
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    values = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(offsets[-1]))
    return Ragged(values, offsets)


def get_examples(rows: Sequence[Encoded]) -> Integers:
    """Returns the index of the example of each row."""
    if isinstance(rows, RowStore):
        return rows.examples()
    return np.fromiter((row.row for row in rows), dtype=np.int64, count=len(rows))


def get_row_mask(rows: Sequence[Encoded], examples: Integers) -> Mask:
    """Returns a mask of the rows that belong to `examples` (indices)."""
    return np.isin(get_examples(rows), examples)


def get_example_mask(rows: Sequence[Encoded], keep: Mask, total: int) -> Mask:
    """Returns a mask of the `total` examples: True if `keep` is True for a row of the example."""
    mask = np.zeros(total, dtype=bool)
    mask[get_examples(rows)[keep]] = True
    return mask


def _ragged(array: Any) -> Ragged:
    offsets = array.offsets.to_numpy().astype(np.int64)
    return Ragged(array.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0])


@dataclass(frozen=True)
class FlatRows:
    """Concatenated encoded rows; rows of one example are adjacent.

    Attributes:
        labels: one label per id, or an encoder-decoder's target ids; None if labels are per row.
        example: index of the example of each row.
    """

    ids: Ragged
    labels: Ragged | None
    example: Integers

    @classmethod
    def of(cls, rows: Sequence[Encoded]) -> FlatRows:
        """Concatenate encoded rows."""
        labels = [row.labels for row in rows if isinstance(row.labels, list)]
        return cls(
            to_ragged(row.input_ids for row in rows),
            to_ragged(labels) if len(labels) == len(rows) else None,
            get_examples(rows),
        )

    def supervised(self) -> Integers:
        """Returns the number of supervised tokens per row; 1 if labels are per row."""
        if self.labels is None:
            return np.ones(len(self.ids), dtype=np.int64)
        return self.labels.count(self.labels.values != IGNORED)


def flat_batches(rows: Sequence[Encoded]) -> Iterator[FlatRows]:
    """Yields `FlatRows` of a few thousand rows each; rows of one example are in the same batch."""
    if isinstance(rows, RowStore):
        for batch in rows.batches():
            labels = _ragged(batch.column("labels")) if rows.has_token_labels else None
            ids, example = _ragged(batch.column("input_ids")), batch.column("row").to_numpy()
            yield FlatRows(ids, labels, example)
        return
    start = 0
    while start < len(rows):
        end = min(start + _ROWS, len(rows))
        while end < len(rows) and rows[end].row == rows[end - 1].row:
            end += 1
        yield FlatRows.of(rows[start:end])
        start = end


MAJORITY_CLASS_RATIO = 0.95
_TWO_TOKENS = 3  # with a space between the two tags


@dataclass(frozen=True)
class TokenCheckContext:
    """Model and task properties for the token checks.

    Attributes:
        ends: ids at which generation stops.
        vocabulary: number of rows of the embedding.
        empty_thinks: token ids of an empty <think></think> in several spellings.
    """

    checks: Checks
    bos: int | None
    ends: frozenset[int]
    vocabulary: int
    empty_thinks: tuple[tuple[int, ...], ...]


def has_missing_eos(flat: FlatRows, eos_ids: Collection[int]) -> Mask:
    """Returns a mask of rows with an answer that does not end with an id of `eos_ids`.

    An answer is a run of supervised tokens. Of a split example, only the last row needs an EOS.
    """
    if flat.labels is None:
        return np.zeros(len(flat.ids), dtype=bool)
    labels, starts = flat.labels.values, flat.labels.starts
    supervised = labels != IGNORED
    target_ends = supervised.copy()
    target_ends[:-1] &= ~supervised[1:]
    row_ends = starts[1:][flat.labels.lengths > 0] - 1
    target_ends[row_ends] = supervised[row_ends]
    missing = flat.labels.any(target_ends & ~np.isin(labels, list(eos_ids)))
    missing[:-1] &= flat.example[:-1] != flat.example[1:]
    return missing


def has_double_bos(flat: FlatRows, bos: int | None) -> Mask:
    """Returns a mask of the rows that begin with `bos` twice."""
    mask = np.zeros(len(flat.ids), dtype=bool)
    if bos is not None:
        pairs = np.flatnonzero(flat.ids.lengths > 1)
        first = flat.ids.starts[pairs]
        mask[pairs] = (flat.ids.values[first] == bos) & (flat.ids.values[first + 1] == bos)
    return mask


def has_invalid_ids(flat: FlatRows, vocabulary: int, *, token_labels: bool) -> Mask:
    """Returns a mask of rows with an id (or label, if `token_labels`) outside the embedding."""
    ids = flat.ids.values
    mask = flat.ids.any((ids >= vocabulary) | (ids < 0))
    if token_labels and flat.labels is not None:
        labels = flat.labels.values
        mask |= flat.labels.any((labels >= vocabulary) | ((labels < 0) & (labels != IGNORED)))
    return mask


def get_empty_think_ids(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """Returns the token ids of an empty <think></think>, for several kinds of white space."""
    spellings = set()
    for space in ("", " ", "\n", "\n\n"):
        ids = tuple(tokenizer(f"<think>{space}</think>", add_special_tokens=False)["input_ids"])
        spellings.add(ids if len(ids) <= _TWO_TOKENS else ids[1:-1])
    return tuple(spellings)


def has_empty_think(flat: FlatRows, spellings: Iterable[tuple[int, ...]]) -> Mask:
    """Returns a mask of the rows whose labels contain one of `spellings` (token ids)."""
    if flat.labels is None:
        return np.zeros(len(flat.ids), dtype=bool)
    labels = flat.labels.values
    mask = np.zeros(len(labels), dtype=bool)
    for spelling in spellings:
        if spelling and len(spelling) <= len(labels):
            windows = np.lib.stride_tricks.sliding_window_view(labels, len(spelling))
            mask[: len(windows)] |= (windows == spelling).all(axis=1)
    return flat.labels.any(mask)


def get_majority_class(labels: Iterable[object]) -> tuple[object, int] | None:
    """Returns the class of at least 95 % of the `labels` and its count, or None."""
    counts = Counter(labels)
    for label, count in counts.most_common(1):
        if count >= MAJORITY_CLASS_RATIO * counts.total():
            return label, count
    return None


TOKEN_CHECKS: dict[str, Callable[[FlatRows, TokenCheckContext], Mask | None]] = {
    "double_bos": lambda flat, context: has_double_bos(flat, context.bos),
    "token_range": lambda flat, context: has_invalid_ids(
        flat, context.vocabulary, token_labels=context.checks.token_labels
    ),
    "unsupervised": lambda flat, context: (
        flat.supervised() == 0 if context.checks.supervised else None
    ),
    "missing_eos": lambda flat, context: (
        has_missing_eos(flat, context.ends) if context.checks.ends and context.ends else None
    ),
    "empty_think": lambda flat, context: (
        has_empty_think(flat, context.empty_thinks) if context.checks.ends else None
    ),
}
"""Field of `config.gate` → check that returns a mask of rows; None if it does not apply."""


_TAG = re.compile(
    r"</?(?:p|br|div|span|img|font|script|style|table|thead|tbody|tr|td|th|ul|ol|li|h[1-6]|pre"
    r"|blockquote|strong|em|hr|sup|sub|small|center|html|head|body|iframe|button|form|input"
    r"|label|nav|section|article|header|footer)(?:\s[^<>]*)?/?>"
    r"|<a\s[^<>]*>|</[abiu]>"
    r"|&(?:amp|lt|gt|quot|apos|nbsp|copy|reg|hellip|mdash|ndash|[lr][sd]quo|#\d{1,6}|#x[\da-f]{1,5});",
    re.IGNORECASE,
)
_CODE = re.compile(r"(`+).*?\1", re.DOTALL)
_MIN_WORDS = 3


@dataclass(frozen=True)
class TextCheckContext:
    """Special tokens for the text checks; `starts` are their distinct first two characters."""

    special: tuple[str, ...] = ()
    starts: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", tuple({text[:2] for text in self.special}))


def has_invalid_turn_order(content: ExampleContent, _: TextCheckContext) -> bool:
    """Returns whether the first turn is the assistant's, or the last one is not."""
    turns = [role for role in content.roles if role != "system"]
    return bool(turns) and (turns[0] == "assistant" or turns[-1] != "assistant")


def has_lost_characters(content: ExampleContent, _: TextCheckContext) -> bool:
    """Returns whether a text contains NUL or U+FFFD, the replacement character."""
    return any(
        "\ufffd" in text or "\0" in text for text in (content.target_text, content.input_text)
    )


def has_html(content: ExampleContent, _: TextCheckContext) -> bool:
    """Returns whether a text contains HTML tags or entities outside of code spans."""
    return any(
        ("<" in text or "&" in text) and _TAG.search(text) and _TAG.search(_CODE.sub("", text))
        for text in (content.input_text, content.target_text)
    )


def has_special_token(content: ExampleContent, context: TextCheckContext) -> bool:
    """Returns whether prompt or answer contain a special token, which would be encoded as such."""
    return content.is_generated and any(
        any(start in text for start in context.starts)
        and any(token in text for token in context.special)
        for text in (content.input_text, content.target_text)
    )


def target_repeats_prompt(content: ExampleContent, _: TextCheckContext) -> bool:
    """Returns whether the answer repeats the prompt; False for answers of one or two words."""
    if not content.is_generated:
        return False
    source, target = content.input_text, content.target_text
    if abs(len(source) - len(target)) > _MAX_WHITE_SPACE:
        return False
    tokens = target.casefold().split()
    return len(tokens) >= _MIN_WORDS and tokens == source.casefold().split()


_MAX_WHITE_SPACE = 16

TEXT_CHECKS: dict[str, Callable[[ExampleContent, TextCheckContext], bool]] = {
    "turn_order": has_invalid_turn_order,
    "lost_characters": has_lost_characters,
    "html": has_html,
    "special_token_text": has_special_token,
    "answer_is_prompt": target_repeats_prompt,
}
"""Field of `config.gate` → check of one example."""
