"""Retrieval datasets in BEIR's layout."""

import json

import pytest

from ftlevel.errors import InputError
from ftlevel.extras.retrieval.beir import RetrievalSet, load_retrieval_set


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def qrels_path(tmp_path):
    write(tmp_path / "queries.jsonl", [{"_id": f"q{n}", "text": f"query {n}"} for n in range(3)])
    documents = [("d1", "T", "one"), ("d2", "", "two"), ("d3", "", "two"), ("d4", "", "four")]
    write(
        tmp_path / "corpus.jsonl",
        [{"_id": name, "title": title, "text": text} for name, title, text in documents],
    )
    (tmp_path / "qrels").mkdir()
    qrels = tmp_path / "qrels" / "test.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\nq0\td1\t1\nq0\td3\t2\nq2\td4\t1\nq1\td4\t0\n")
    return qrels


def test_duplicate_documents_are_merged_and_unjudged_queries_dropped(qrels_path):
    assert load_retrieval_set(qrels_path) == RetrievalSet(
        ["query 0", "query 2"],
        ["T one", "two", "four"],
        [{0: 1.0, 1: 2.0}, {2: 1.0}],
        merged=1,
        unjudged=1,
    )


def test_highest_grade_of_merged_documents_is_used(qrels_path):
    qrels_path.write_text("query-id\tcorpus-id\tscore\nq0\td3\t3\nq0\td2\t1\nq0\td1\t-1\n")
    assert load_retrieval_set(qrels_path).relevant == [{1: 3.0}]


def test_corpus_without_relevant_documents_raises(qrels_path, tmp_path):
    other = tmp_path / "other.jsonl"
    write(other, [{"_id": "d1", "title": "", "text": "one"}])
    with pytest.raises(
        InputError, match=r"2 relevant judgments refer to a missing query or document.*--corpus"
    ):
        load_retrieval_set(qrels_path, other)


def test_judgments_without_columns_raise(qrels_path):
    qrels_path.write_text("a\tb\tc\nq0\td1\t1\n")
    with pytest.raises(InputError, match="none of the columns query-id"):
        load_retrieval_set(qrels_path)


def test_score_that_is_not_a_number_raises(qrels_path):
    qrels_path.write_text("query-id\tcorpus-id\tscore\nq0\td1\tyes\n")
    with pytest.raises(InputError, match="'score' is 'yes', where a number is expected"):
        load_retrieval_set(qrels_path)


def test_judgments_without_relevant_document_raise(qrels_path):
    qrels_path.write_text("query-id\tcorpus-id\tscore\nq0\td1\t0\n")
    with pytest.raises(InputError, match="no score is above 0"):
        load_retrieval_set(qrels_path)


@pytest.mark.parametrize("name", ["queries", "corpus"])
def test_id_of_two_texts_raises(qrels_path, tmp_path, name):
    path = tmp_path / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write(path, [*rows, rows[0]])
    load_retrieval_set(qrels_path)
    write(path, [*rows, {**rows[0], "text": "other"}])
    first = rows[0]["_id"]
    with pytest.raises(InputError, match=f"jsonl:{len(rows) + 1}: '_id' '{first}' is that of ano"):
        load_retrieval_set(qrels_path)
