"""Words with tags: are the tags whole, and which token stands for which word.

Words are joined by spaces and tokenized as the text that they came from; a token belongs to the
word whose characters it covers. (`is_split_into_words` would do for BERT, but in transformers 5 it
takes the leading space from the words of GPT-2, RoBERTa and Qwen, so that they are other words.)
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.data.formats.examples import Tagged
from ftlevel.data.formats.labels import LabelSet
from ftlevel.data.sources.table import BadRow, Table

_BATCH = 1_000
_BIO = re.compile(r"O|[BI]-.+")


@dataclass(frozen=True)
class TaggedRow(Encoded):
    """A sentence as the model sees it; its labels are -100 but on the first token of each word.

    Attributes:
        tags: number of each word's tag.
        positions: index of each word's first token; None for a word that has none, such as a lone
            control character.
    """

    tags: tuple[int, ...] = field(default=(), metadata={"column": "ints"})
    positions: tuple[int | None, ...] = field(default=(), metadata={"column": "places"})


def find_orphans(examples: Sequence[Tagged], names: Sequence[str], table: Table) -> list[BadRow]:
    """Return the rows in which an I- tag continues nothing, which BIO does not allow.

    Tags of another scheme pass. So do files in which no B- opens an entity anew: there I- opens
    entities by right (IOB1, IO).
    """
    if not all(_BIO.fullmatch(name) for name in names):
        return []
    orphans: list[BadRow] = []
    begins = False
    for example in examples:
        before, reported = "O", False
        for index, tag in enumerate(example.tags):
            name = tag if isinstance(tag, str) else names[tag]
            follows = before != "O" and before[2:] == name[2:]
            begins = begins or (name.startswith("B-") and not follows)
            if name.startswith("I-") and not follows and not reported:
                line, reported = table.lines[example.row], True
                place = f"follows {before!r}" if index else "begins the row"
                orphans.append(
                    BadRow(
                        line,
                        f"tag {index + 1}, {name!r}, {place}; in BIO an entity begins with "
                        f"'B-{name[2:]}'",
                    )
                )
            before = name
    return orphans if begins else []


def encode_tagged(tokenizer: Any, examples: Sequence[Tagged], labels: LabelSet) -> list[Encoded]:
    """Encode sentences with their tags."""
    rows: list[Encoded] = []
    numbers = {name: number for number, name in enumerate(labels.names)}
    for start in range(0, len(examples), _BATCH):
        chunk = examples[start : start + _BATCH]
        encoding = encode_words(tokenizer, [example.tokens for example in chunk])
        for ids, extras, positions, example in zip(*encoding, chunk, strict=True):
            tags = tuple(numbers[t] if isinstance(t, str) else t for t in example.tags)
            targets = [IGNORED] * len(ids)
            for position, tag in zip(positions, tags, strict=True):
                if position is not None:
                    targets[position] = tag
            rows.append(TaggedRow(ids, targets, example.row, extras, tags, positions))
    return rows


def encode_words(
    tokenizer: Any, sentences: Sequence[Sequence[str]]
) -> tuple[list[list[int]], list[dict[str, list[int]]], list[tuple[int | None, ...]]]:
    """Tokenize sentences of words.

    Returns:
        For each sentence its token ids, further inputs such as `token_type_ids`, and the index of
        the first token of each word.
    """
    encoding = tokenizer([" ".join(words) for words in sentences], return_offsets_mapping=True)
    further = [n for n in encoding if n not in ("input_ids", "attention_mask", "offset_mapping")]
    extras = [{n: encoding[n][i] for n in further} for i in range(len(sentences))]
    positions = [
        first_tokens(words, offsets)
        for words, offsets in zip(sentences, encoding["offset_mapping"], strict=True)
    ]
    return encoding["input_ids"], extras, positions


def first_tokens(
    words: Sequence[str], offsets: Sequence[tuple[int, int]]
) -> tuple[int | None, ...]:
    """Return the index of the first token of each word.

    Args:
        words: joined by single spaces, they are the text.
        offsets: characters that each token covers; empty for special tokens.
    """
    starts = [0]
    for text in words[:-1]:
        starts.append(starts[-1] + len(text) + 1)
    first: list[int | None] = [None] * len(words)
    for index, (begin, end) in enumerate(offsets):
        if begin == end:
            continue
        word = bisect_right(starts, end - 1) - 1
        within = end - 1 < starts[word] + len(words[word])  # else it covers the space after it
        if within and first[word] is None:
            first[word] = index
    return tuple(first)
