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
from ftlevel.data.formats.examples import ExampleParts
from ftlevel.data.formats.turns import UnusableRowError, check_text, parse_json, parse_turns
from ftlevel.data.sources.table import json_type_name

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
        """Text that identifies the example in duplicate checks."""
        return "\0".join((self.query, *self.documents, *map(str, self.labels), self.group))

    @property
    def parts(self) -> ExampleParts:
        """The query, and its documents or class, for duplicate checks."""
        last = "\n".join(self.documents) or self.group
        return ExampleParts(self.query, last, "", last)


def build_pairs(roles: RoleValues) -> EmbeddingRow:
    """Build an example of an anchor with its positives and negatives.

    With negatives, `label` has a teacher's scores: a list, or the margin of a triplet. Without
    them, it is the similarity score of the pair.
    """
    good, bad = _texts(roles, "positive"), _texts(roles, "negative")
    for n in range(1, MOST_NEGATIVES + 1):
        bad += _texts(roles, f"negative_{n}")
    if not good:
        raise UnusableRowError(f"{roles.columns['positive']!r} holds no text", "empty_text")
    query = roles.text("anchor")
    if "label" not in roles:
        return _ranking(roles, query, good, bad)
    value = _parsed(roles, "label")
    if isinstance(value, list):
        return _ranking(roles, query, good, bad, _numbers(roles, "label", len(good) + len(bad)))
    number = _number(value, roles.columns["label"])
    if not bad and len(good) == 1:
        return EmbeddingRow(query, roles.index, tuple(good), (number,), "score")
    if (len(good), len(bad)) != (1, 1):
        raise UnusableRowError(
            f"{roles.columns['label']!r} is one number for {len(good) + len(bad)} documents; "
            "expected is a list with a number for each"
        )
    return _ranking(roles, query, good, bad, (number, 0.0))


def build_scored(roles: RoleValues) -> EmbeddingRow:
    """Build an example of two texts with a score, or a query with a document and its label."""
    second = "sentence2" if "sentence2" in roles else "document"
    first = "sentence1" if "sentence1" in roles else "query"
    score = _number(roles.get("score"), roles.columns["score"])
    query, document = roles.text(first), roles.text(second)
    return EmbeddingRow(query, roles.index, (document,), (score,), "score")


def build_listed(roles: RoleValues) -> EmbeddingRow:
    """Build an example of a query, its documents and their labels, best document first."""
    texts = _texts(roles, "documents")
    labels = _numbers(roles, "labels", len(texts))
    teacher = _numbers(roles, "teacher", len(texts)) if "teacher" in roles else ()
    order = sorted(range(len(texts)), key=lambda i: -labels[i])
    return EmbeddingRow(
        roles.text("query"),
        roles.index,
        tuple(texts[i] for i in order),
        tuple(labels[i] for i in order),
        teacher=tuple(teacher[i] for i in order) if teacher else (),
        prompt=roles.text_or_empty("prompt"),
    )


def build_flag(roles: RoleValues) -> EmbeddingRow:
    """Build an example from FlagEmbedding's columns: query, pos, neg, and scores of a teacher."""
    good, bad = _texts(roles, "pos"), _texts(roles, "neg")
    if not good:
        raise UnusableRowError(f"{roles.columns['pos']!r} holds no text", "empty_text")
    scores: tuple[float, ...] = ()
    if _has(roles, "pos_scores") or _has(roles, "neg_scores"):
        scores = _numbers(roles, "pos_scores", len(good)) + _numbers(roles, "neg_scores", len(bad))
    return _ranking(roles, roles.text("query"), good, bad, scores)


def build_tevatron(roles: RoleValues) -> EmbeddingRow:
    """Build an example from tevatron's columns, where passages have a title and a text."""
    good, bad = _texts(roles, "positive_passages"), _texts(roles, "negative_passages")
    if not good:
        raise UnusableRowError("has no positive passage", "empty_text")
    return _ranking(roles, roles.text("query"), good, bad)


def build_messages(roles: RoleValues) -> EmbeddingRow:
    """Build an example from ms-swift's columns, where query and documents are conversations."""
    query = _conversation(_parsed(roles, "messages"), roles.columns["messages"])
    good, bad = (
        _conversations(roles, "positive_messages"),
        _conversations(roles, "negative_messages"),
    )
    if not good:
        raise UnusableRowError(f"{roles.columns['positive_messages']!r} is empty", "empty_text")
    if _has(roles, "label") and not bad and len(good) == 1:
        score = _number(roles.get("label"), roles.columns["label"])
        return EmbeddingRow(query, roles.index, tuple(good), (score,), "score")
    return _ranking(roles, query, good, bad)


def build_grouped(roles: RoleValues) -> EmbeddingRow:
    """Build an example of a text with its class."""
    value = roles.get("label")
    if value is None or isinstance(value, list | dict | float):
        raise UnusableRowError(
            f"{roles.columns['label']!r} is {json_type_name(value)}, where a class is expected"
        )
    return EmbeddingRow(roles.text("text"), roles.index, kind="class", group=str(value))


def build_query(roles: RoleValues) -> EmbeddingRow:
    """Build a query to embed, as an example without documents."""
    return EmbeddingRow(roles.text("query"), roles.index)


def build_document(roles: RoleValues) -> EmbeddingRow:
    """Build a document to embed, with its title if it has one."""
    title, text = roles.text_or_empty("title"), roles.text("text")
    return EmbeddingRow("", roles.index, (f"{title} {text}" if title else text,), (0.0,))


def build_candidates(roles: RoleValues) -> EmbeddingRow:
    """Build an example of a query with documents to score; a single document has kind `score`."""
    role = "documents" if "documents" in roles else "document"
    kind: Kind = "ranking" if role == "documents" else "score"
    texts = _texts(roles, role)
    if not texts:
        raise UnusableRowError(f"{roles.columns[role]!r} holds no text", "empty_text")
    return EmbeddingRow(roles.text("query"), roles.index, tuple(texts), (0.0,) * len(texts), kind)


def _ranking(
    roles: RoleValues,
    query: str,
    good: Sequence[str],
    bad: Sequence[str],
    teacher: tuple[float, ...] = (),
) -> EmbeddingRow:
    labels = (1.0,) * len(good) + (0.0,) * len(bad)
    return EmbeddingRow(
        query,
        roles.index,
        (*good, *bad),
        labels,
        teacher=teacher,
        prompt=roles.text_or_empty("prompt"),
    )


def _has(roles: RoleValues, role: str) -> bool:
    return role in roles and roles.get(role) is not None


def _parsed(roles: RoleValues, role: str) -> Any:
    """Returns the value of a role; a cell that begins with `[` is parsed as JSON."""
    value = roles.get(role)
    if isinstance(value, str) and value.lstrip().startswith("["):
        return parse_json(value, repr(roles.columns[role]))
    return value


def _texts(roles: RoleValues, role: str) -> list[str]:
    """Returns the texts of a role: a text, a passage with a title, or a list of either."""
    if not _has(roles, role):
        return []
    value, name = roles.get(role), repr(roles.columns[role])
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):  # a text, such as "[1] a reference"
            parsed = json.loads(value)
            value = parsed if all(isinstance(each, str | dict) for each in parsed) else value
    if isinstance(value, str) and not value.strip() and role.startswith("negative"):
        return []  # fewer negatives than columns, in a file of cells
    if not isinstance(value, list):
        return [_text(value, name)]
    return [_text(each, f"item {number} of {name}") for number, each in enumerate(value, 1)]


def _text(value: object, name: str) -> str:
    """Returns the text of `value`; a passage is its title and text, joined by a space."""
    if not isinstance(value, dict):
        return check_text(value, name)
    title, text = value.get("title"), value.get("text", value.get("contents"))
    if not isinstance(text, str) or not isinstance(title, str | None):
        raise UnusableRowError(f"{name} has no 'text'")
    return check_text(f"{title} {text}" if title else text, name)


def _numbers(roles: RoleValues, role: str, count: int) -> tuple[float, ...]:
    """Returns the numbers of a role; raises `UnusableRowError` unless there are `count`."""
    value = _parsed(roles, role) if role in roles else []
    name = roles.columns.get(role, role)
    if not isinstance(value, list):
        value = [] if value is None else [value]
    if len(value) != count:
        raise UnusableRowError(f"{name!r} has {len(value)} numbers for {count} documents")
    return tuple(_number(each, name) for each in value)


def _number(value: object, column: str) -> float:
    if isinstance(value, bool):
        return float(value)
    try:
        number = float(value)  # type: ignore[arg-type]  # a TypeError is handled
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UnusableRowError(f"{column!r} is {value!r}, where a number is expected")
    return number


def _conversations(roles: RoleValues, role: str) -> list[str]:
    """Returns a list of texts: the conversation or conversations of a role, each as one text."""
    if not _has(roles, role):
        return []
    value, name = _parsed(roles, role), roles.columns[role]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = [value]
    if not isinstance(value, list):
        raise UnusableRowError(
            f"{name!r} is {json_type_name(value)}, where a list of conversations is expected"
        )
    return [_conversation(each, name) for each in value]


def _conversation(value: Any, column: str) -> str:
    turns = parse_turns(value, column, answered=False)
    return check_text("\n".join(turn.content for turn in turns), repr(column))


_QUERY = ("query", "question", "anchor")
_DOCUMENT = ("document", "passage", "text", "answer", "doc")
_SCORE = ("score", "label", "labels", "scores", "similarity_score", "similarity")
_NEGATIVES = {f"negative_{n}": (f"negative_{n}",) for n in range(1, MOST_NEGATIVES + 1)}
_PROMPT = {"prompt": ("prompt", "instruction")}

FLAG_SHAPE = FormatSpec(
    "query + pos",
    build_flag,
    {"query": ("query",), "pos": ("pos",)},
    {"neg": ("neg",), "pos_scores": ("pos_scores",), "neg_scores": ("neg_scores",), **_PROMPT},
    guessable=False,
)
TEVATRON_SHAPE = FormatSpec(
    "query + positive_passages",
    build_tevatron,
    {"query": ("query",), "positive_passages": ("positive_passages",)},
    {"negative_passages": ("negative_passages",)},
    guessable=False,
)
MESSAGES_SHAPE = FormatSpec(
    "messages + positive_messages",
    build_messages,
    {"messages": ("messages",), "positive_messages": ("positive_messages",)},
    {"negative_messages": ("negative_messages",), "label": ("label",)},
    guessable=False,
)
LISTED_SHAPE = FormatSpec(
    "query + documents + labels",
    build_listed,
    {
        "query": _QUERY,
        "documents": ("documents", "docs", "passages", "texts"),
        "labels": ("labels", "label", "scores", "score"),
    },
    {"teacher": ("teacher", "teacher_scores"), **_PROMPT},
    guessable=False,
)
SENTENCES_SHAPE = FormatSpec(
    "sentence1 + sentence2 + score",
    build_scored,
    {
        "sentence1": (
            "sentence1",
            "sentence_1",
            "text1",
            "text_1",
            "sentence_A",
            "premise",
            "question1",
        ),
        "sentence2": (
            "sentence2",
            "sentence_2",
            "text2",
            "text_2",
            "sentence_B",
            "hypothesis",
            "question2",
        ),
        "score": _SCORE,
    },
)
DOCUMENT_SHAPE = FormatSpec(
    "query + document + score",
    build_scored,
    {"query": _QUERY, "document": _DOCUMENT, "score": _SCORE},
    guessable=False,
)
PAIRS_SHAPE = FormatSpec(
    "anchor + positive",
    build_pairs,
    {
        "anchor": ("anchor", "query", "question", "sentence1", "text1"),
        "positive": (
            "positive",
            "positives",
            "document",
            "passage",
            "answer",
            "sentence2",
            "text2",
            "text",
        ),
    },
    {
        "negative": ("negative", "negatives"),
        **_NEGATIVES,
        "label": ("label", "labels", "score", "scores"),
    },
)
GROUPED_SHAPE = FormatSpec(
    "text + label",
    build_grouped,
    {"text": ("text", "sentence", "content"), "label": ("label",)},
    guessable=False,
)

RANKING_SHAPES = (
    FLAG_SHAPE,
    TEVATRON_SHAPE,
    MESSAGES_SHAPE,
    LISTED_SHAPE,
    SENTENCES_SHAPE,
    DOCUMENT_SHAPE,
    PAIRS_SHAPE,
)
"""Layouts with documents, for embedding models and rerankers."""
EMBEDDING_SHAPES = (*RANKING_SHAPES, GROUPED_SHAPE)
QUERY_SHAPES = (
    FormatSpec("query", build_query, {"query": (*_QUERY, "sentence1")}, guessable=False),
    FormatSpec(
        "text",
        build_document,
        {"text": (*_DOCUMENT, "positive", "sentence", "content", "sentence2")},
        {"title": ("title",)},
    ),
)
"""Layouts of texts to be embedded."""
CANDIDATE_SHAPES = (
    FormatSpec(
        "query + documents",
        build_candidates,
        {"query": _QUERY, "documents": ("documents", "docs", "passages", "texts")},
        guessable=False,
    ),
    FormatSpec(
        "query + document",
        build_candidates,
        {"query": (*_QUERY, "sentence1"), "document": (*_DOCUMENT, "positive", "sentence2")},
    ),
)
"""Layouts of queries with documents to be scored."""
