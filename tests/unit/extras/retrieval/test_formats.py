"""Tests that every layout of retrieval data gives the same row, by its column names."""

import pytest

from ftlevel.data.formats.detect import NoFormatError, detect_format
from ftlevel.data.formats.examples import convert_rows
from ftlevel.data.sources.table import Table
from ftlevel.extras.retrieval.formats import (
    CANDIDATE_SHAPES,
    EMBEDDING_SHAPES,
    QUERY_SHAPES,
    EmbeddingRow,
)


def convert(row, shapes=EMBEDDING_SHAPES):
    table = Table([row], [1], "rows.jsonl")
    format_ = detect_format(list(row), "embedding", shapes, rows=[row])
    examples, bad = convert_rows(table, format_)
    return format_.name, examples, [problem.message for problem in bad]


def create_messages(text, role="user"):
    return [{"role": role, "content": text}]


RANKING = EmbeddingRow("q", 0, ("p", "n", "m"), (1, 0, 0))
ROWS = [
    ({"positive": "p", "anchor": "q"}, EmbeddingRow("q", 0, ("p",), (1,))),
    ({"answer": "p", "question": "q", "id": 7}, EmbeddingRow("q", 0, ("p",), (1,))),
    ({"negative": "n", "positive": "p", "query": "q"}, EmbeddingRow("q", 0, ("p", "n"), (1, 0))),
    ({"negative_2": "m", "anchor": "q", "negative_1": "n", "positive": "p"}, RANKING),
    ({"anchor": "q", "positive": "p", "negatives": ["n", "m"]}, RANKING),
    ({"anchor": "q", "positive": "p", "negatives": '["n", "m"]'}, RANKING),
    (
        {"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": None},
        EmbeddingRow("q", 0, ("p", "n"), (1, 0)),
    ),
    (
        {"query": "q", "positive": "p", "negative": "n", "label": 2.5},
        EmbeddingRow("q", 0, ("p", "n"), (1, 0), teacher=(2.5, 0)),
    ),
    (
        {"query": "q", "positive": "p", "negative": "n", "label": [3, 1]},
        EmbeddingRow("q", 0, ("p", "n"), (1, 0), teacher=(3, 1)),
    ),
    ({"anchor": "q", "positive": "p", "label": 0.5}, EmbeddingRow("q", 0, ("p",), (0.5,), "score")),
    (
        {"score": "0.8", "sentence2": "p", "sentence1": "q"},
        EmbeddingRow("q", 0, ("p",), (0.8,), "score"),
    ),
    ({"premise": "q", "hypothesis": "p", "label": 1}, EmbeddingRow("q", 0, ("p",), (1,), "score")),
    ({"query": "q", "document": "p", "label": True}, EmbeddingRow("q", 0, ("p",), (1,), "score")),
    ({"query": "q", "documents": ["n", "p", "m"], "labels": [0, 1, 0]}, RANKING),
    (
        {"query": "q", "docs": ["n", "p"], "labels": [1, 2], "teacher_scores": [0.1, 0.9]},
        EmbeddingRow("q", 0, ("p", "n"), (2, 1), teacher=(0.9, 0.1)),
    ),
    ({"query": "q", "pos": ["p"], "neg": ["n", "m"]}, RANKING),
    ({"query": "q", "pos": '["p"]', "neg": ""}, EmbeddingRow("q", 0, ("p",), (1,))),  # of CSV
    (
        {
            "query": "q",
            "pos": ["p"],
            "neg": ["n"],
            "pos_scores": [2],
            "neg_scores": [-1],
            "prompt": "Find it: ",
        },
        EmbeddingRow("q", 0, ("p", "n"), (1, 0), teacher=(2, -1), prompt="Find it: "),
    ),
    (
        {
            "query": "q",
            "query_id": "1",
            "positive_passages": [{"docid": "1", "title": "t", "text": "p"}],
            "negative_passages": [{"docid": "2", "title": "", "text": "n"}],
        },
        EmbeddingRow("q", 0, ("t p", "n"), (1, 0)),
    ),
    (
        {
            "messages": create_messages("q"),
            "positive_messages": [create_messages("p")],
            "negative_messages": [create_messages("n"), create_messages("m", "assistant")],
        },
        RANKING,
    ),
    (
        {
            "messages": create_messages("q"),
            "positive_messages": [create_messages("p")],
            "label": 0.8,
        },
        EmbeddingRow("q", 0, ("p",), (0.8,), "score"),
    ),
    ({"text": "q", "label": 3}, EmbeddingRow("q", 0, kind="class", group="3")),
]


@pytest.mark.parametrize(("row", "expected"), ROWS, ids=["+".join(row) for row, _ in ROWS])
def test_each_layout_gives_expected_row(row, expected):
    _, examples, bad = convert(row)
    assert (list(examples), bad) == ([expected], [])


def test_column_order_has_no_effect():
    for row, expected in ROWS:
        reversed_row = dict(reversed(row.items()))
        assert list(convert(reversed_row)[1]) == [expected]


def test_positives_and_negatives_follow_labels():
    row = EmbeddingRow("q", 0, ("a", "b", "c"), (2, 1, 0))
    assert (row.positives, row.negatives) == (("a", "b"), ("c",))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"anchor": "q", "positive": " "}, "'positive' is empty"),
        ({"anchor": None, "positive": "p"}, "'anchor' is null"),
        ({"sentence1": "a", "sentence2": "b", "score": "high"}, "'score' is 'high'"),
        ({"sentence1": "a", "sentence2": "b", "score": float("nan")}, "where a number"),
        ({"sentence1": "a", "sentence2": "b", "score": 10**400}, "where a number"),
        (
            {"query": "q", "documents": ["a", "b"], "labels": [1]},
            "1 of 2 numbers, one per",
        ),
        ({"query": "q", "pos": [], "neg": ["n"]}, "'pos' has no text"),
        ({"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1]}, "0 of 1 numbers"),
        ({"query": "q", "positive_passages": [{"title": "t"}]}, "has no 'text'"),
        ({"query": "q", "positive": "p", "negatives": ["n", "m"], "label": 2}, "one number for 3"),
        ({"text": "q", "label": 0.5}, "where a class is expected"),
        ({"text": "q", "label": ""}, "'label' is empty"),
    ],
)
def test_invalid_row_is_reported_with_reason(row, message):
    assert message in convert(row)[2][0]


@pytest.mark.parametrize("columns", [["text"], ["a", "b"], ["positive", "negative"]])
def test_columns_without_pair_raise(columns):
    with pytest.raises(NoFormatError, match=r"no format matches the columns"):
        detect_format(columns, "embedding", EMBEDDING_SHAPES)


def test_query_and_candidate_formats():
    assert convert({"query": "q", "_id": "1"}, QUERY_SHAPES)[1] == [EmbeddingRow("q", 0)]
    for row in ({"text": "t d"}, {"_id": "1", "title": "t", "text": "d"}, {"passage": "t d"}):
        assert convert(row, QUERY_SHAPES)[1] == [EmbeddingRow("", 0, ("t d",), (0,))]
    titled = convert({"title": "t", "text": ""}, QUERY_SHAPES)[1]  # BEIR's corpora have such
    assert titled == [EmbeddingRow("", 0, ("t",), (0,))]
    with_list = convert({"query": "q", "documents": ["a", "b"]}, CANDIDATE_SHAPES)[1]
    assert with_list == [EmbeddingRow("q", 0, ("a", "b"), (0, 0))]
    with_one = convert({"query": "q", "document": "a"}, CANDIDATE_SHAPES)[1]
    assert with_one == [EmbeddingRow("q", 0, ("a",), (0,), "score")]
