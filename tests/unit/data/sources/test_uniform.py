"""Detection of inconsistent rows in a file."""

from __future__ import annotations

import pytest

from ftlevel.data.sources.table import get_inconsistent_rows


@pytest.mark.parametrize(
    ("rows", "expected_lines"),
    [
        ([{"a": 1}, {"a": 2.5}, {"a": None}], []),
        ([{"a": 1, "b": 2}, {"b": 3, "a": 4}], []),  # the order of keys does not matter
        ([{"a": None}, {"a": None}], []),
        ([{"a": None}, {"a": "x"}, {"a": 1}], [3]),
        ([{"a": "x"}, {"a": 1}, {"a": 2}], [1]),  # the first row is inconsistent
        ([{"a": 1}, {"a": True}], [2]),  # True is an int in Python
        ([{"a": "x"}, {"a": {}}, {"a": []}], [2, 3]),
        ([{"a": 1}, {"b": 1}, {"b": 1}, {"b": "x"}], [1, 4]),
        ([{"a": 1, "b": "x"}, {"a": "y", "b": 2}, {"a": 1, "b": "x"}], [2, 2]),
    ],
)
def test_get_inconsistent_rows(rows, expected_lines):
    inconsistent = get_inconsistent_rows(rows, list(range(1, len(rows) + 1)))
    assert [row.line for row in inconsistent] == expected_lines
