from __future__ import annotations

from collections.abc import Sequence

import pytest

from ftlevel.data.encoding.spans import (
    TaggedRow,
    encode_tagged,
    first_tokens,
    get_invalid_bio_tags,
)
from ftlevel.data.formats.examples import TaggedTokens
from ftlevel.data.formats.labels import LabelSet
from ftlevel.data.sources.table import Table
from tiny_models import FAMILIES
from tiny_tokenizers import build_tokenizer

NAMES = ("B-LOC", "I-LOC", "O")


def make_examples(*rows: Sequence[str | int]) -> tuple[list[TaggedTokens], Table]:
    examples = [TaggedTokens(tuple("w" * len(tags)), tuple(tags), i) for i, tags in enumerate(rows)]
    table = Table([{"tags": list(tags)} for tags in rows], list(range(1, len(rows) + 1)), "x.jsonl")
    return examples, table


def test_first_token_of_each_word():
    # text: "New York ​ 5"; the space before a word may belong to its token
    offsets = [(0, 0), (0, 1), (1, 3), (3, 8), (8, 9), (10, 12), (0, 0)]
    assert first_tokens(("New", "York", "​", "5"), offsets) == (1, 3, None, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_tokenized_as_in_text(family):
    tokenizer = build_tokenizer(family, None)
    words = ("The", "value", "of", "New", "York", "parser", ",", "object", "-5")
    labels = LabelSet(tuple("abcdefghi"))
    [row] = encode_tagged(tokenizer, [TaggedTokens(words, tuple("abcdefghi"), 7)], labels)
    assert isinstance(row, TaggedRow)
    assert row.row == 7
    assert row.input_ids == tokenizer(" ".join(words))["input_ids"]
    assert None not in row.positions
    assert list(row.positions) == sorted(set(row.positions))
    ends = [*row.positions[1:], len(row.input_ids)]
    for word, begin, end in zip(words[:-1], row.positions, ends, strict=False):
        text = tokenizer.decode(row.input_ids[begin:end]).strip().rstrip("▁").strip()
        assert text.lower() == word.lower()
    supervised = {at: label for at, label in enumerate(row.labels) if label != -100}
    assert supervised == dict(zip(row.positions, range(9), strict=True))


@pytest.mark.parametrize("names", [None, NAMES])
def test_invalid_bio_tags_are_reported(names):
    rows = [["O", "B-LOC", "I-LOC"], ["I-LOC", "O"], ["O", "O", "I-LOC"], ["B-LOC", "O", "O"]]
    if names:  # as class numbers
        rows = [[names.index(tag) for tag in row] for row in rows]
    examples, table = make_examples(*rows)
    invalid = get_invalid_bio_tags(examples, NAMES, table)
    assert [(bad.line, bad.message) for bad in invalid] == [
        (2, "tag 1, 'I-LOC', begins the row; in BIO an entity begins with 'B-LOC'"),
        (3, "tag 3, 'I-LOC', follows 'O'; in BIO an entity begins with 'B-LOC'"),
    ]


@pytest.mark.parametrize(
    "rows",
    [
        (["I-LOC", "I-LOC", "B-LOC"], ["O", "I-LOC"]),  # IOB1: B- only separates adjacent entities
        (["O", "I-LOC"],),  # IO
        (["NOUN", "I-LOC"],),
    ],
)
def test_other_tagging_schemes_are_accepted(rows):
    examples, table = make_examples(*rows)
    names = sorted({tag for row in rows for tag in row})
    assert get_invalid_bio_tags(examples, names, table) == []
