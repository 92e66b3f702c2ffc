"""Questions with their contexts, in overlapping windows that the model can take.

Answers are found by their characters and become the first and the last token of a span; a window
that does not hold the whole answer points to its first token, which no context has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.formats.examples import Question
from ftlevel.errors import InputError

USUAL_LENGTH = 384
"""Tokens of a window where nothing else is said, as in SQuAD's baselines (Devlin et al., 2019)."""
_BATCH = 1_000
Offsets = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Window(Encoded):
    """A question with a part of its context; its labels are the answer's first and last token.

    Attributes:
        context: the whole context.
        answers: texts that answer the question, each with its start in the context.
        context_start: index of the context's first token in the window.
        offsets: characters in `context` of each of the context's tokens.
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
    """Encode questions, each with one window or more of its context.

    Args:
        tokenizer: a fast one.
        examples: the questions.
        length: of a window, in tokens.
        stride: tokens by which windows overlap.
        separator: what ends the question where the tokenizer sets no token between the two.
        where: index of an example → where the user finds it.
        drop: leave out a question that leaves no room for its context.

    Returns:
        The windows, and how many questions were left out.

    Raises:
        InputError: a question leaves no room, and `drop` is false.
    """
    fitting = list(_with_room(tokenizer, examples, length, stride, separator, where, drop))
    windows: list[Encoded] = []
    for start in range(0, len(fitting), _BATCH):
        chunk = fitting[start : start + _BATCH]
        encoding = tokenizer(
            [example.question + separator for example in chunk],
            [example.context for example in chunk],
            truncation="only_second",
            max_length=length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        skipped = ("input_ids", "attention_mask", "offset_mapping", "overflow_to_sample_mapping")
        further = [name for name in encoding if name not in skipped]
        for index, sample in enumerate(encoding["overflow_to_sample_mapping"]):
            extras = {name: encoding[name][index] for name in further}
            windows.append(_build_window(encoding, index, chunk[sample], extras))
    return windows, len(examples) - len(fitting)


def _build_window(
    encoding: Any, index: int, example: Question, extras: dict[str, list[int]]
) -> Window:
    parts = encoding.sequence_ids(index)
    first = parts.index(1)
    last = len(parts) - 1 - parts[::-1].index(1)
    offsets = tuple((a, b) for a, b in encoding["offset_mapping"][index][first : last + 1])
    span = (0, 0)
    if example.answers:
        text, start = example.answers[0]
        found = find_span(offsets, start, start + len(text))
        span = (first + found[0], first + found[1]) if found else span
    return Window(
        encoding["input_ids"][index], span, example.row, extras,
        example.context, example.answers, first, offsets,
    )  # fmt: skip


def find_span(offsets: Offsets, begin: int, end: int) -> tuple[int, int] | None:
    """Return the first and the last token that cover the characters `begin` to `end`.

    None if they are not all there. A token may cover more, such as the space before a word.
    """
    first = next((i for i, (_, b) in enumerate(offsets) if b > begin), None)
    last = next((i for i in range(len(offsets) - 1, -1, -1) if offsets[i][0] < end), None)
    if first is None or last is None or first > last:
        return None
    whole = offsets[first][0] <= begin and offsets[last][1] >= end
    return (first, last) if whole else None


def _with_room(
    tokenizer: Any,
    examples: Sequence[Question],
    length: int,
    stride: int,
    separator: str,
    where: Callable[[int], str],
    drop: bool,
) -> list[Question]:
    """Return the questions that leave room for more than the overlap of two windows."""
    special = tokenizer.num_special_tokens_to_add(pair=True)
    asked = [example.question + separator for example in examples]
    sizes = [len(ids) for ids in tokenizer(asked, add_special_tokens=False)["input_ids"]]
    most = length - special - stride - 1
    over = [i for i, size in enumerate(sizes) if size > most]
    if not over or (drop and len(over) < len(examples)):
        crowded = set(over)
        return [example for i, example in enumerate(examples) if i not in crowded]
    worst = max(over, key=lambda i: sizes[i])
    raise InputError(
        f"{len(over):,} of {len(examples):,} questions leave no room for their context in windows "
        f"of {length:,} tokens that overlap by {stride:,}; the longest has {sizes[worst]:,} tokens "
        f"({where(examples[worst].row)}). Raise --max-length to {length + sizes[worst] - most:,}, "
        "lower --set data.doc_stride, or pass --overlong drop."
    )
