"""Character spans are converted to word tags; invalid spans are reported."""

from __future__ import annotations

from typing import Any

import pytest

from ftlevel.config import DataConfig
from ftlevel.data.formats.examples import to_examples
from ftlevel.data.sources.table import Table
from ftlevel.errors import InputError
from ftlevel.tasks import TASKS

TEXT = "In New York, Ada-Lovelace é."


def convert_to_tags(row: dict[str, Any]) -> Any:
    table = Table([row], [3], "x.jsonl")
    shape = TASKS["token-classification"].get_format(table.column_names, DataConfig(), table.rows)
    (example,) = to_examples(table, shape)
    return dict(zip(example.tokens, example.tags, strict=True))


@pytest.mark.parametrize(
    "row",
    [
        {"text": TEXT, "entities": [{"start": 3, "end": 11, "label": "LOC"}]},
        {"text": TEXT, "entities": [[3, 11, "LOC"]]},
        {"text": TEXT, "label": [[3, 11, "LOC"]]},
        {"text": TEXT, "spans": [{"start": 2, "end": 11, "label": "LOC", "token_start": 1}],
         "tokens": [{"text": "In", "start": 0}]},
    ],
)  # fmt: skip
def test_span_formats_of_tools_give_equal_tags(row):
    assert convert_to_tags(row) == {
        "In": "O", "New": "B-LOC", "York": "I-LOC", ",": "O", "Ada": "O", "-": "O",
        "Lovelace": "O", "é": "O", ".": "O",
    }  # fmt: skip


def test_row_without_spans_has_no_entities():
    assert set(convert_to_tags({"text": TEXT, "entities": []}).values()) == {"O"}


def test_queries_are_split_into_the_same_words():
    row = {"text": TEXT, "tokens": [{"text": "In", "start": 0}]}
    table = Table([row], [1], "x.jsonl")
    shape = TASKS["token-classification"].get_query_format(table.column_names, {}, rows=table.rows)
    (question,) = to_examples(table, shape)
    assert question.tokens == tuple(convert_to_tags({"text": TEXT, "entities": []}))


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ([[3, 9, "LOC"]], "'LOC' at 3 to 9 cuts the word 'York' ('New Yo')"),
        ([[4, 6, "LOC"]], "'LOC' at 4 to 6 cuts the word 'New' ('ew')"),
        ([[3, 11, "LOC"], [7, 16, "PER"]],
         "two spans of 'entities' overlap at 7; a word has one tag"),
        ([[3, 99, "LOC"]], "'LOC' goes to 99, and the text has 28 characters"),
        ([[2, 3, "LOC"]], "'LOC' at 2 to 3 covers no word"),
        ([[5, 3, "LOC"]], "span 1 of 'entities' goes from 5 to 3"),
        ([[3, 11]], "span 1 of 'entities' is a list, not an object or a list of start, end, label"),
        ([{"start": 3, "stop": 11}],
         "span 1 of 'entities' needs start, end and label (keys: start, stop)"),
        ([[3.0, 11, "LOC"]],
         "span 1 of 'entities' is [3.0, 11, 'LOC'], not two whole numbers and a name"),
        ("LOC", "'entities' is a string, not a list of spans"),
    ],
)  # fmt: skip
def test_invalid_span_raises(spans, reason):
    with pytest.raises(InputError) as error:
        convert_to_tags({"text": TEXT, "entities": spans})
    assert str(error.value).startswith(f"x.jsonl:3: {reason}.")
