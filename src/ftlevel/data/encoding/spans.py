"""Encode extractive question answering and token classification.

Questions are encoded with overlapping windows of their context; labels are the first and last token
of the answer, or (0, 0) if the window does not contain it.

Tagged words are joined with spaces and tokenized as text: `is_split_into_words` of transformers 5
removes the leading space of words for GPT-2, RoBERTa and Qwen.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from ftlevel.data.encoding.encode import extra_inputs, split_batches
from ftlevel.data.encoding.row import IGNORED, Encoded, RowError
from ftlevel.data.formats.examples import Question, TaggedTokens
from ftlevel.data.formats.labels import LabelSet
from ftlevel.data.sources.table import BadRow, Table
from ftlevel.errors import InputError

DEFAULT_WINDOW_LENGTH = 384
"""Default window length in tokens, as in SQuAD's baselines (Devlin et al., 2019)."""
Offsets = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Window(Encoded):
    """A question with one window of the context.

    Attributes:
        answers: reference answers, each with the start character in `context`.
        context_start: index of the first context token in `input_ids`.
        offsets: character offsets in `context` of each context token.
    """

    context: str = field(default="", metadata={"column": "text"})
    answers: tuple[tuple[str, int], ...] = field(default=(), metadata={"column": "json"})
    context_start: int = field(default=0, metadata={"column": "int"})
    offsets: Offsets = field(default=(), metadata={"column": "pairs"})


def encode_questions(
    tokenizer: Any,
    examples: Sequence[Question],
    *,
    length: int,
    stride: int,
    separator: str,
    where: Callable[[int], str],
    drop: bool = False,
) -> tuple[list[Encoded], int]:
    """Returns one or more `Window` rows per question, and the number of questions dropped.

    `length` and `stride`, the overlap of consecutive windows, are in tokens. `separator` follows
    the question. Questions that leave no room for their context are dropped if `drop`, else they
    raise `InputError` with `where(row)`.
    """
    special = tokenizer.num_special_tokens_to_add(pair=True)
    questions = [example.question + separator for example in examples]
    sizes = [len(ids) for ids in tokenizer(questions, add_special_tokens=False)["input_ids"]]
    limit = length - special - stride - 1
    fitting = [example for example, size in zip(examples, sizes, strict=True) if size <= limit]
    if len(fitting) < len(examples) and not (drop and fitting):
        worst = max(range(len(sizes)), key=sizes.__getitem__)
        raise InputError(
            f"{len(examples) - len(fitting):,} of {len(examples):,} questions leave no room for "
            f"their context in windows of {length:,} tokens that overlap by {stride:,}; the "
            f"longest has {sizes[worst]:,} tokens ({where(examples[worst].row)}). Raise "
            f"--max-length to {length + sizes[worst] - limit:,}, lower --set data.doc_stride, or "
            "pass --overlong drop."
        )
    windows: list[Encoded] = []
    for chunk in split_batches(fitting):
        encoding = tokenizer(
            [example.question + separator for example in chunk],
            [example.context for example in chunk],
            truncation="only_second",
            max_length=length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for index, sample in enumerate(encoding["overflow_to_sample_mapping"]):
            windows.append(_create_window(encoding, index, chunk[sample]))
    return windows, len(examples) - len(fitting)


def _create_window(encoding: Any, index: int, example: Question) -> Window:
    sequences = encoding.sequence_ids(index)
    if 1 not in sequences:
        raise RowError(example.row, "has a context without tokens. Remove the row.")
    first = sequences.index(1)
    last = len(sequences) - 1 - sequences[::-1].index(1)
    offsets = tuple((a, b) for a, b in encoding["offset_mapping"][index][first : last + 1])
    span = (0, 0)
    if example.answers:
        text, start = example.answers[0]
        start += len(text) - len(text.lstrip())  # spaces have no token
        if tokens := get_span(offsets, start, start + len(text.strip())):
            span = (first + tokens[0], first + tokens[1])
    return Window(
        encoding["input_ids"][index],
        span,
        example.row,
        extra_inputs(encoding, index),
        example.context,
        example.answers,
        first,
        offsets,
    )


def get_span(offsets: Offsets, start: int, end: int) -> tuple[int, int] | None:
    """Returns the indices in `offsets` of the first and last token of an answer's characters.

    None if the window of the context does not contain all characters from `start` to `end`.
    """
    first = next((i for i, (_, b) in enumerate(offsets) if b > start), None)
    last = next((i for i in range(len(offsets) - 1, -1, -1) if offsets[i][0] < end), None)
    if first is None or last is None or first > last:
        return None
    is_complete = offsets[first][0] <= start and offsets[last][1] >= end
    return (first, last) if is_complete else None


_BIO = re.compile(r"O|[BI]-.+")


@dataclass(frozen=True)
class TaggedRow(Encoded):
    """A tagged sentence; labels are -100 except at `positions`, the `first_tokens` of the words."""

    tags: tuple[int, ...] = field(default=(), metadata={"column": "ints"})
    positions: tuple[int | None, ...] = field(default=(), metadata={"column": "positions"})


def get_invalid_bio_tags(
    examples: Sequence[TaggedTokens], names: Sequence[str], table: Table
) -> list[BadRow]:
    """Returns a `BadRow` per row whose I- tag continues no entity; [] if the tags are not BIO."""
    if not all(_BIO.fullmatch(name) for name in names):
        return []
    invalid: list[BadRow] = []
    is_bio = False
    for example in examples:
        before, message = "O", ""
        for index, tag in enumerate(example.tags):
            name = tag if isinstance(tag, str) else names[tag]
            follows = before != "O" and before[2:] == name[2:]
            is_bio = is_bio or (name.startswith("B-") and not follows)
            if name.startswith("I-") and not follows and not message:
                location = f"follows {before!r}" if index else "begins the row"
                message = (
                    f"tag {index + 1}, {name!r}, {location}; in BIO an entity begins with "
                    f"'B-{name[2:]}'"
                )
                invalid.append(BadRow(table.lines[example.row], message))
            before = name
    return invalid if is_bio else []


def encode_tagged(
    tokenizer: Any, examples: Sequence[TaggedTokens], labels: LabelSet
) -> list[Encoded]:
    """Encode sentences of tagged words."""
    rows: list[Encoded] = []
    for chunk in split_batches(examples):
        encoding = encode_words(tokenizer, [example.tokens for example in chunk])
        for ids, extras, positions, example in zip(*encoding, chunk, strict=True):
            tags = tuple(map(labels.id_of, example.tags))
            targets = [IGNORED] * len(ids)
            for position, tag in zip(positions, tags, strict=True):
                if position is not None:
                    targets[position] = tag
            rows.append(TaggedRow(ids, targets, example.row, extras, tags, positions))
    return rows


def encode_words(
    tokenizer: Any, sentences: Sequence[Sequence[str]]
) -> tuple[list[list[int]], list[dict[str, list[int]]], list[tuple[int | None, ...]]]:
    """Returns three lists, one item per sentence: ids, `extra_inputs`, first token of each word."""
    encoding = tokenizer([" ".join(words) for words in sentences], return_offsets_mapping=True)
    extras = [extra_inputs(encoding, i) for i in range(len(sentences))]
    positions = [
        first_tokens(words, offsets)
        for words, offsets in zip(sentences, encoding["offset_mapping"], strict=True)
    ]
    return encoding["input_ids"], extras, positions


def first_tokens(
    words: Sequence[str], offsets: Sequence[tuple[int, int]]
) -> tuple[int | None, ...]:
    """Returns the index of the first token of each word; None for a word without tokens.

    `offsets` are the (start, end) characters of each token in the words joined by spaces.
    """
    starts = list(accumulate((len(word) + 1 for word in words[:-1]), initial=0))
    first: list[int | None] = [None] * len(words)
    for index, (start, end) in enumerate(offsets):
        if start == end:
            continue
        word = bisect_right(starts, end - 1) - 1
        is_space = end - 1 >= starts[word] + len(words[word])
        if not is_space and first[word] is None:
            first[word] = index
    return tuple(first)
