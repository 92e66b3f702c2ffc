"""Data checks of queries and documents: contradicting labels, and documents that differ by case."""

from __future__ import annotations

from collections.abc import Sequence

from ftlevel.tasks.embedding.formats import EmbeddingRow

_SHOWN = 60  # characters of a document


def check_documents(rows: Sequence[EmbeddingRow]) -> list[tuple[str, int, str]]:
    """Returns (check name, number of documents or pairs, description) per failed check of `rows`.

    `contradicting_labels`: a document is relevant and irrelevant to a query. `document_variants`:
    documents differ only by case and white space, so that one may be a false negative.
    """
    found = []
    if (contradictions := _get_contradictions(rows))[0]:
        found.append(("contradicting_labels", *contradictions))
    if (variants := _get_variants(rows))[0]:
        found.append(("document_variants", *variants))
    return found


def check_eval_set(
    training_set: Sequence[EmbeddingRow],
    eval_set: Sequence[EmbeddingRow],
    corpus: Sequence[str] | None,
) -> list[tuple[str, str, Sequence[int], str]]:
    """Returns (check name, split, row indices, example) per failed check of the validation rows.

    `missing_positives`: a relevant document is not in the corpus. `trained_documents`: a searched
    document is a positive of a training row, which biases the evaluation.
    """
    if eval_set[0].kind != "ranking":
        return []
    found: list[tuple[str, str, Sequence[int], str]] = []
    documents = {text for row in eval_set for text in row.documents}
    if corpus is not None:
        documents = set(corpus)
        missing = {
            row.row: text for row in eval_set for text in row.positives if text not in documents
        }
        if missing:
            example = next(iter(missing.values()))
            found.append(("missing_positives", "validation", list(missing), _shorten(example)))
    shared = {row.row: text for row in training_set for text in row.positives if text in documents}
    if shared:
        example = next(iter(shared.values()))
        found.append(("trained_documents", "train", list(shared), _shorten(example)))
    return found


def _shorten(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")


def _get_contradictions(rows: Sequence[EmbeddingRow]) -> tuple[int, str]:
    """Returns the number of (query, document) pairs with contradicting labels, and an example."""
    seen: dict[tuple[str, str], tuple[bool, int]] = {}
    pairs: set[tuple[str, str]] = set()
    first = ""
    for row in rows:
        if row.kind == "class":
            return 0, ""
        query = row.prompt + row.query
        for text, label in zip(row.documents, row.labels, strict=True):
            is_good, before = seen.setdefault((query, text), (label > 0, row.row))
            if is_good != (label > 0):
                first = first or f"rows {before + 1} and {row.row + 1}"
                pairs.add((query, text))
    return len(pairs), first


def _get_variants(rows: Sequence[EmbeddingRow]) -> tuple[int, str]:
    """Returns the number of documents that repeat another up to case and space, and an example."""
    seen: dict[str, tuple[str, int]] = {}
    variants: set[str] = set()
    first = ""
    for row in rows:
        for text in row.documents:
            other, before = seen.setdefault(" ".join(text.lower().split()), (text, row.row))
            if other != text and text not in variants:
                first = first or f"rows {before + 1} and {row.row + 1}"
                variants.add(text)
    return len(variants), first
