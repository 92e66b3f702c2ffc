"""Column layouts of retrieval data, and the one row type that all of them become.

Columns are found by name and never by order. Layouts: anchor with positive and negatives, two
sentences with a score, a query with documents and labels, FlagEmbedding, tevatron, ms-swift, and
texts with a class.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ftlevel.data.formats.detect import FormatSpec, RoleValues
from ftlevel.data.formats.examples import ExampleContent
from ftlevel.data.formats.turns import UnusableRowError, check_text, parse_json, parse_turns
from ftlevel.data.sources.table import json_type_name, to_float

MOST_NEGATIVES = 32
"""Largest n of a column `negative_n`."""

Kind = Literal["ranking", "score", "class"]


@dataclass(frozen=True)
class EmbeddingRow:
    """A query with its documents, two texts with a score, or a text with a class.

    Attributes:
        query: query, anchor or first text, without its prompt.
        row: index in the table.
        documents: positives before negatives, or the second text.
        labels: relevance of each document (0 for a negative), or the score of the pair.
        kind: what the row has: `ranking` (relevance), `score` (similarity) or `class`.
        teacher: a teacher model's score of each document; empty without a teacher.
        prompt: instruction of this row; "" for the configured one.
        group: class of a text without documents.
    """

    query: str
    row: int
    documents: tuple[str, ...] = ()
    labels: tuple[float, ...] = ()
    kind: Kind = "ranking"
    teacher: tuple[float, ...] = ()
    prompt: str = ""
    group: str = ""

    @property
    def positives(self) -> tuple[str, ...]:
        """Documents with a label above 0."""
        return tuple(t for t, label in zip(self.documents, self.labels, strict=True) if label > 0)

    @property
    def negatives(self) -> tuple[str, ...]:
        """Documents with a label of 0 or less."""
        return tuple(t for t, label in zip(self.documents, self.labels, strict=True) if label <= 0)

    @property
    def key_text(self) -> str:
        query = self.prompt + self.query
        return "\0".join((query, *self.documents, *map(str, self.labels), self.group))

    @property
    def content(self) -> ExampleContent:
        """The query, and its documents or class, for duplicate checks."""
        last = "\n".join(self.documents) or self.group
        return ExampleContent(self.query, last, "", last)


def create_pairs(values: RoleValues) -> EmbeddingRow:
    """Create an example of an anchor with its positives and negatives.

    The column `label` is a pair's similarity score, a list of a teacher's scores of all documents,
    or a triplet's margin.
    """
    good, bad = _required_texts(values, "positive"), _texts(values, "negative")
    for n in range(1, MOST_NEGATIVES + 1):
        bad += _texts(values, f"negative_{n}")
    query = values.text("anchor")
    if "label" not in values:
        return _ranking(values, query, good, bad)
    value = _parsed(values, "label")
    if isinstance(value, list):
        return _ranking(values, query, good, bad, _numbers(values, "label", len(good) + len(bad)))
    number = _number(value, values.columns["label"])
    if not bad and len(good) == 1:
        return EmbeddingRow(query, values.index, tuple(good), (number,), "score")
    if (len(good), len(bad)) != (1, 1):
        raise UnusableRowError(
            f"{values.columns['label']!r} is one number for {len(good) + len(bad)} documents; "
            "expected is a list with a number for each"
        )
    return _ranking(values, query, good, bad, (number, 0.0))


def create_scored(values: RoleValues) -> EmbeddingRow:
    """Create an example of two texts with a score, or a query with a document and its label."""
    second = "sentence2" if "sentence2" in values else "document"
    first = "sentence1" if "sentence1" in values else "query"
    score = _number(values.get("score"), values.columns["score"])
    query, document = values.text(first), values.text(second)
    return EmbeddingRow(query, values.index, (document,), (score,), "score")


def create_listed(values: RoleValues) -> EmbeddingRow:
    """Create an example of a query, its documents and their labels, best document first."""
    texts = _required_texts(values, "documents")
    labels = _numbers(values, "labels", len(texts))
    teacher = _numbers(values, "teacher", len(texts)) if "teacher" in values else ()
    order = sorted(range(len(texts)), key=lambda i: -labels[i])
    return EmbeddingRow(
        values.text("query"),
        values.index,
        tuple(texts[i] for i in order),
        tuple(labels[i] for i in order),
        teacher=tuple(teacher[i] for i in order) if teacher else (),
        prompt=values.text_or_empty("prompt"),
    )


def create_flagged(values: RoleValues) -> EmbeddingRow:
    """Create an example from FlagEmbedding's columns: query, pos, neg, and scores of a teacher."""
    good, bad = _required_texts(values, "pos"), _texts(values, "neg")
    scores: tuple[float, ...] = ()
    counts = {"pos_scores": len(good), "neg_scores": len(bad)}
    if any(_has(values, role) for role in counts):
        scores = tuple(n for role, count in counts.items() for n in _numbers(values, role, count))
    return _ranking(values, values.text("query"), good, bad, scores)


def create_tevatron(values: RoleValues) -> EmbeddingRow:
    """Create an example from tevatron's columns, where passages have a title and a text."""
    good = _required_texts(values, "positive_passages")
    return _ranking(values, values.text("query"), good, _texts(values, "negative_passages"))


def create_messages(values: RoleValues) -> EmbeddingRow:
    """Create an example from ms-swift's columns, where query and documents are conversations."""
    query = _conversation(_parsed(values, "messages"), values.columns["messages"])
    good, bad = (_conversations(values, f"{kind}_messages") for kind in ("positive", "negative"))
    if not good:
        raise UnusableRowError(f"{values.columns['positive_messages']!r} is empty", "empty_text")
    if _has(values, "label") and not bad and len(good) == 1:
        score = _number(values.get("label"), values.columns["label"])
        return EmbeddingRow(query, values.index, tuple(good), (score,), "score")
    return _ranking(values, query, good, bad)


def create_grouped(values: RoleValues) -> EmbeddingRow:
    """Create an example of a text with its class."""
    value = values.get("label")
    if value is None or isinstance(value, list | dict | float):
        raise UnusableRowError(
            f"{values.columns['label']!r} is {json_type_name(value)}, where a class is expected"
        )
    group = check_text(str(value), repr(values.columns["label"]))
    return EmbeddingRow(values.text("text"), values.index, kind="class", group=group)


def create_query(values: RoleValues) -> EmbeddingRow:
    """Create a query to embed, as an example without documents."""
    if "query" in values:
        return EmbeddingRow(values.text("query"), values.index)
    query = _conversation(_parsed(values, "messages"), values.columns["messages"])
    return EmbeddingRow(query, values.index)


def create_document(values: RoleValues) -> EmbeddingRow:
    """Create a document to embed: its title, if it has one, and its text; one may be empty."""
    title = values.text_or_empty("title")
    text = values.text_or_empty("text") if title else values.text("text")
    return EmbeddingRow("", values.index, (" ".join(filter(None, (title, text))),), (0.0,))


def create_candidates(values: RoleValues) -> EmbeddingRow:
    """Create an example of a query with `documents` to score, or one `document` (kind `score`)."""
    role = "documents" if "documents" in values else "document"
    kind: Kind = "ranking" if role == "documents" else "score"
    texts = _required_texts(values, role)
    return EmbeddingRow(values.text("query"), values.index, tuple(texts), (0.0,) * len(texts), kind)


def _ranking(
    values: RoleValues,
    query: str,
    positive: Sequence[str],
    negative: Sequence[str],
    teacher: tuple[float, ...] = (),
) -> EmbeddingRow:
    labels = (1.0,) * len(positive) + (0.0,) * len(negative)
    documents, prompt = (*positive, *negative), values.text_or_empty("prompt")
    return EmbeddingRow(query, values.index, documents, labels, teacher=teacher, prompt=prompt)


def _has(values: RoleValues, role: str) -> bool:
    return role in values and values.get(role) is not None


def _parsed(values: RoleValues, role: str) -> Any:
    value = values.get(role)
    if isinstance(value, str) and value.lstrip().startswith("["):
        return parse_json(value, repr(values.columns[role]))
    return value


def _texts(values: RoleValues, role: str) -> list[str]:
    if not _has(values, role):
        return []
    value, name = values.get(role), repr(values.columns[role])
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):  # a text, such as "[1] a reference"
            parsed = json.loads(value)
            value = parsed if all(isinstance(each, str | dict) for each in parsed) else value
    if isinstance(value, str) and not value.strip() and role.startswith("neg"):
        return []  # no negatives, or fewer than columns, in a file of cells
    if not isinstance(value, list):
        return [_text(value, name)]
    return [_text(each, f"item {number} of {name}") for number, each in enumerate(value, 1)]


def _required_texts(values: RoleValues, role: str) -> list[str]:
    if not (texts := _texts(values, role)):
        raise UnusableRowError(f"{values.columns[role]!r} has no text", "empty_text")
    return texts


def _text(value: object, name: str) -> str:
    """Returns the text of `value`; of a dict, its title and text, joined by a space."""
    if not isinstance(value, dict):
        return check_text(value, name)
    title, text = value.get("title"), value.get("text", value.get("contents"))
    if not isinstance(text, str) or not isinstance(title, str | None):
        raise UnusableRowError(f"{name} has no 'text'")
    return check_text(f"{title} {text}" if title else text, name)


def _numbers(values: RoleValues, role: str, count: int) -> tuple[float, ...]:
    value = _parsed(values, role) if role in values else []
    name = values.columns.get(role, role)
    if not isinstance(value, list):
        value = [] if value is None else [value]
    if len(value) != count:
        raise UnusableRowError(f"{name!r} has {len(value)} of {count} numbers, one per document")
    return tuple(_number(each, name) for each in value)


def _number(value: object, column: str) -> float:
    number = to_float(value)
    if not math.isfinite(number):
        raise UnusableRowError(f"{column!r} is {value!r}, where a number is expected")
    return number


def _conversations(values: RoleValues, role: str) -> list[str]:
    if not _has(values, role):
        return []
    value, name = _parsed(values, role), values.columns[role]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = [value]
    if not isinstance(value, list):
        raise UnusableRowError(
            f"{name!r} is {json_type_name(value)}, where a list of conversations is expected"
        )
    return [_conversation(each, name) for each in value]


def _conversation(value: Any, column: str) -> str:
    turns = parse_turns(value, column, needs_assistant=False)
    return check_text("\n".join(turn.content for turn in turns), repr(column))


_QUERY = ("query", "question", "anchor")
_DOCUMENT = ("document", "passage", "text", "answer", "doc")
_SCORE = ("score", "label", "labels", "scores", "similarity_score", "similarity")
_POSITIVE = ("positive", "positives", "document", "passage", "answer", "sentence2", "text2", "text")
_FIRST = ("sentence1", "sentence_1", "text1", "text_1", "sentence_A", "premise", "question1")
_SECOND = ("sentence2", "sentence_2", "text2", "text_2", "sentence_B", "hypothesis", "question2")
_NEGATIVES = {f"negative_{n}": (f"negative_{n}",) for n in range(1, MOST_NEGATIVES + 1)}
_PROMPT = {"prompt": ("prompt", "instruction")}

RANKING_SHAPES = (
    FormatSpec(
        "query + pos",
        create_flagged,
        {"query": ("query",), "pos": ("pos",)},
        {"neg": ("neg",), "pos_scores": ("pos_scores",), "neg_scores": ("neg_scores",), **_PROMPT},
        guessable=False,
    ),
    FormatSpec(
        "query + positive_passages",
        create_tevatron,
        {"query": ("query",), "positive_passages": ("positive_passages",)},
        {"negative_passages": ("negative_passages",)},
        guessable=False,
    ),
    FormatSpec(
        "messages + positive_messages",
        create_messages,
        {"messages": ("messages",), "positive_messages": ("positive_messages",)},
        {"negative_messages": ("negative_messages",), "label": ("label",)},
        guessable=False,
    ),
    FormatSpec(
        "query + documents + labels",
        create_listed,
        {
            "query": _QUERY,
            "documents": ("documents", "docs", "passages", "texts"),
            "labels": ("labels", "label", "scores", "score"),
        },
        {"teacher": ("teacher", "teacher_scores"), **_PROMPT},
        guessable=False,
    ),
    FormatSpec(
        "sentence1 + sentence2 + score",
        create_scored,
        {"sentence1": _FIRST, "sentence2": _SECOND, "score": _SCORE},
    ),
    FormatSpec(
        "query + document + score",
        create_scored,
        {"query": _QUERY, "document": _DOCUMENT, "score": _SCORE},
        guessable=False,
    ),
    FormatSpec(
        "anchor + positive",
        create_pairs,
        {"anchor": ("anchor", "query", "question", "sentence1", "text1"), "positive": _POSITIVE},
        {
            "negative": ("negative", "negatives"),
            **_NEGATIVES,
            "label": ("label", "labels", "score", "scores"),
        },
    ),
)
"""Layouts with documents, for embedding models and rerankers."""
EMBEDDING_SHAPES = (
    *RANKING_SHAPES,
    FormatSpec(
        "text + label",
        create_grouped,
        {"text": ("text", "sentence", "content"), "label": ("label",)},
        guessable=False,
    ),
)
QUERY_SHAPES = (
    FormatSpec("query", create_query, {"query": (*_QUERY, "sentence1")}, guessable=False),
    FormatSpec("messages", create_query, {"messages": ("messages",)}, guessable=False),
    FormatSpec(
        "text",
        create_document,
        {"text": (*_DOCUMENT, "positive", "sentence", "content", "sentence2")},
        {"title": ("title",)},
    ),
)
"""Layouts of texts to be embedded."""
CANDIDATE_SHAPES = (
    FormatSpec(
        "query + documents",
        create_candidates,
        {"query": _QUERY, "documents": ("documents", "docs", "passages", "texts")},
        guessable=False,
    ),
    FormatSpec(
        "query + document",
        create_candidates,
        {"query": (*_QUERY, "sentence1"), "document": (*_DOCUMENT, "positive", "sentence2")},
    ),
)
"""Layouts of queries with documents to be scored."""
