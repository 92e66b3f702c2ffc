"""Planted faults in queries and documents are found, and clean rows are not reported."""

from ftlevel.tasks.embedding.checks import check_documents
from ftlevel.tasks.embedding.formats import EmbeddingRow


def row(number, query, good, *bad):
    return EmbeddingRow(query, number, (good, *bad), (1.0, *(0.0 for _ in bad)))


def test_clean_rows_have_no_findings():
    assert check_documents([row(0, "q", "a", "b"), row(1, "r", "b", "a")]) == []


def test_a_document_cannot_be_relevant_and_irrelevant_to_one_query():
    rows = [row(0, "q", "a", "b"), row(1, "r", "b", "a"), row(2, "q", "b", "c")]
    assert check_documents(rows) == [("contradicting_labels", 1, "rows 1 and 3")]


def test_documents_that_differ_by_case_and_white_space():
    rows = [row(0, "q", "A text"), row(1, "r", "a  text"), row(2, "s", "a text "), row(3, "t", "b")]
    assert check_documents(rows) == [("document_variants", 2, "rows 1 and 2")]
