"""Tests of cutting a query with its documents to a maximum length."""

import pytest

from ftlevel.data.encoding.fit import truncate_row
from ftlevel.extras.retrieval.pairs import RankedRow

QUERY = [101, 1, 2, 3, 4, 5, 6, 102]
DOCUMENTS = ([7, 8, 9, 10, 102], [11, 102])


def _row() -> RankedRow:
    ids = [*QUERY, *DOCUMENTS[0], *DOCUMENTS[1]]
    types = [0] * len(QUERY) + [1] * (len(ids) - len(QUERY))
    sizes = tuple(map(len, DOCUMENTS))
    return RankedRow(ids, 0, 0, {"types": types}, len(QUERY), sizes, (1.0, 0.0), (1.0, 0.0))


@pytest.mark.parametrize(
    ("limit", "query", "documents"),
    [
        (13, QUERY, DOCUMENTS),
        (12, [101, 1, 2, 3, 6, 102], DOCUMENTS),  # the longer pair has 13 tokens
        (8, [101, 1, 6, 102], ([7, 8, 9, 102], [11, 102])),
        (4, [101, 6, 102], ([102], [102])),
        (3, [6, 102], ([102], [102])),
        (2, [102], ([102], [102])),
        (1, [], ([102], [102])),
    ],
)
def test_pairs_are_cut_to_any_length(
    limit: int, query: list[int], documents: tuple[list[int], ...]
) -> None:
    row = truncate_row(_row(), limit)
    pairs = [sequence.input_ids for sequence in row.sequences]
    assert pairs == [query + document for document in documents]
    assert row.length == max(map(len, pairs)) <= limit
    types = [sequence.extras["types"] for sequence in row.sequences]
    assert types == [[0] * len(query) + [1] * len(document) for document in documents]
