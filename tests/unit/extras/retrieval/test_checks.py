"""Tests that errors in queries and documents are found, and clean rows are not reported."""

from dataclasses import replace

from ftlevel.extras.retrieval.encoding import check_documents
from ftlevel.extras.retrieval.formats import EmbeddingRow


def row(index, query, positive, *negatives):
    return EmbeddingRow(query, index, (positive, *negatives), (1.0, *(0.0 for _ in negatives)))


def test_clean_rows_have_no_findings():
    assert check_documents([row(0, "q", "a", "b"), row(1, "r", "b", "a")]) == []


def test_contradicting_labels_are_reported():
    rows = [row(0, "q", "a", "b"), row(1, "r", "b", "a"), row(2, "q", "b", "c")]
    assert check_documents(rows) == [("contradicting_labels", 1, "rows 1 and 3")]


def test_labels_of_different_instructions_do_not_contradict():
    rows = [replace(row(0, "q", "a", "b"), prompt="Find a: "), row(1, "q", "b", "a")]
    assert check_documents(rows) == []
    assert rows[0].key_text != replace(rows[0], prompt="").key_text


def test_documents_differing_in_case_and_whitespace_are_reported():
    rows = [row(0, "q", "A text"), row(1, "r", "a  text"), row(2, "s", "a text "), row(3, "t", "b")]
    assert check_documents(rows) == [("document_variants", 2, "rows 1 and 2")]
