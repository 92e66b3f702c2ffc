"""Retrieval sets in BEIR's layout: queries.jsonl, corpus.jsonl and qrels/NAME.tsv.

Documents of equal text are one document, whatever their ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlevel.data.sources.readers import load_table
from ftlevel.errors import InputError, join_names

_IDS = ("_id", "id", "docid", "query-id", "query_id")
_QUERIES = ("query-id", "query_id", "qid")
_DOCUMENTS = ("corpus-id", "corpus_id", "docid", "doc_id", "pid")
_SCORES = ("score", "relevance", "label")


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, distinct documents, and for each query its relevant documents: index → grade.

    `merged` is the number of documents that repeat another document's text, `unjudged` the number
    of queries that are left out because no document is relevant to them.
    """

    queries: Sequence[str]
    documents: Sequence[str]
    relevant: Sequence[Mapping[int, float]]
    merged: int
    unjudged: int


def retrieval_files(qrels: Path) -> list[Path]:
    """Returns the paths of queries.jsonl and corpus.jsonl, next to `qrels` or above `qrels/`."""
    folder = qrels.parent.parent if qrels.parent.name == "qrels" else qrels.parent
    return [folder / "queries.jsonl", folder / "corpus.jsonl"]


def load_retrieval_set(qrels: Path, corpus: Path | None = None) -> RetrievalSet:
    """Load the retrieval set of the relevance judgments `qrels` and its `retrieval_files`.

    `corpus` is used instead of corpus.jsonl. Raises `InputError` if a file is missing, or a
    judgment names an unknown query or document.
    """
    table = load_table(qrels)
    queries_path, own_corpus = retrieval_files(qrels)
    queries = _read_texts(queries_path)
    corpus = corpus or own_corpus
    documents = _read_texts(corpus)
    texts = list(dict.fromkeys(documents.values()))
    positions = {text: at for at, text in enumerate(texts)}
    relevant: dict[str, dict[int, float]] = {}
    lost: list[str] = []
    names = [
        _column(table.column_names, candidates, qrels)
        for candidates in (_QUERIES, _DOCUMENTS, _SCORES)
    ]
    for at, row in enumerate(table.rows):
        query, document, score = (row[name] for name in names)
        grade = _number(score, table.where(at), names[2])
        if grade <= 0:
            continue
        if str(query) not in queries:
            lost.append(f"{table.where(at)}: query {query!r}")
        elif str(document) not in documents:
            lost.append(f"{table.where(at)}: document {document!r}")
        else:
            grades, index = relevant.setdefault(str(query), {}), positions[documents[str(document)]]
            grades[index] = max(grade, grades.get(index, 0))
    if lost:
        raise InputError(
            f"{len(lost):,} relevant judgments refer to a missing query or document: "
            f"{join_names(lost, 2)}. Queries are read from {queries_path}, documents "
            f"from {corpus}. Choose another corpus with --corpus."
        )
    if not relevant:
        raise InputError(f"{qrels}: no score is above 0. Give relevant documents a score of 1.")
    judged = [query for query in queries if query in relevant]
    return RetrievalSet(
        [queries[query] for query in judged],
        texts,
        [dict(sorted(relevant[query].items())) for query in judged],
        len(documents) - len(texts),
        len(queries) - len(judged),
    )


def _number(value: Any, location: str, column: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"{location}: {column!r} is {value!r}, where a number is expected. Give relevant "
            "documents 1, others 0."
        ) from None


def load_corpus(path: Path) -> list[str]:
    """Load the distinct documents of a file with the column `text` and optionally `title`."""
    table = load_table(path)
    _column(table.column_names, ("text",), path)
    return list(dict.fromkeys(map(_text, table.rows)))


def _read_texts(path: Path) -> dict[str, str]:
    table = load_table(path)
    name = _column(table.column_names, _IDS, path)
    _column(table.column_names, ("text",), path)
    texts: dict[str, str] = {}
    for at, row in enumerate(table.rows):
        text = _text(row)
        if texts.setdefault(str(row[name]), text) != text:
            raise InputError(
                f"{table.where(at)}: {name!r} {row[name]!r} is that of another text above. Give "
                "each text its own."
            )
    return texts


def _text(row: Mapping[str, Any]) -> str:
    return " ".join(str(part) for part in (row.get("title"), row["text"]) if part)


def _column(column_names: Sequence[str], candidates: Sequence[str], path: Path) -> str:
    result = next((name for name in candidates if name in column_names), None)
    if result is None:
        raise InputError(
            f"{path}: has none of the columns {join_names(candidates)}. Columns: "
            f"{join_names(map(repr, column_names))}."
        )
    return result
