"""Embed texts, and score an embedding model: validation loss, retrieval or similarity metrics.

Queries search the distinct documents of all validation rows, or a corpus. The positives of all rows
with the same query are relevant to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.row import Encoded
from ftlevel.evaluation.answers import InferenceModel
from ftlevel.extras.retrieval.config import EMBEDDING_LOSSES
from ftlevel.extras.retrieval.formats import EmbeddingRow
from ftlevel.extras.retrieval.metrics import (
    average_precision,
    iterate_scores,
    resampled_precision,
    score_retrieval,
    spearman,
)
from ftlevel.extras.retrieval.objective import METRICS, Embeddings, LabelKind
from ftlevel.extras.retrieval.rows import StepTexts
from ftlevel.tasks.base import OutputOptions
from ftlevel.trained.generation import Divide, compute_all

MAX_BATCH_TOKENS = 4_096
"""Positions of a forward pass, unless a text is longer."""

WINDOW = 2_048
"""Number of texts that are sorted by length together."""

Report = Callable[[int, float | None], None]
"""Function that is called with the number of embedded texts, and their fraction of all."""


def embed_texts(
    model: Any,
    objective: Embeddings,
    texts: Sequence[Encoded],
    pad_id: int,
    device: str,
    divide: Divide = compute_all,
) -> torch.Tensor:
    """Returns float32 vectors `(texts, dims)` on the CPU, in the order of `texts`."""
    collator = Collator(pad_id)
    order = sorted(range(len(texts)), key=lambda at: -len(texts[at].input_ids))
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        length = len(texts[order[start]].input_ids)
        batches.append(order[start : start + max(1, MAX_BATCH_TOKENS // length)])
        start += len(batches[-1])

    def collate(part: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        return {name: value.to(device) for name, value in collator(part).items()}

    def embed(parts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        chunks = ([texts[at] for at in indices] for indices in parts)
        vectors = (objective.embed_texts(model, chunk, collate) for chunk in chunks)
        return [own.float().cpu().numpy() for own in vectors]

    vectors = np.concatenate(divide(embed, batches))
    return torch.from_numpy(vectors[np.argsort(order)])


def step_losses(
    objective: Embeddings, vectors: torch.Tensor, step: StepTexts
) -> list[float | None]:
    """Returns each row's loss within its group of rows, or None.

    If the rows of a group share a loss that has no terms of single rows, it is that of each row.
    """
    objective = objective.for_validation(step)
    losses: list[float | None] = []
    for group in get_loss_groups(objective, step):
        part = step.select(group)
        mean = objective.group_loss(vectors, part)
        if mean is None or not objective.has_row_losses:
            losses += [mean] * len(part)
        else:
            losses += objective.row_losses(vectors, part)
    return losses


def get_loss_groups(objective: Embeddings, step: StepTexts) -> list[slice]:
    """Returns groups of `objective.step_rows` rows, whose losses are computed together."""
    objective, size = objective.for_validation(step), objective.step_rows
    positions = list(range(0, len(step), size))
    compares_rows = (
        EMBEDDING_LOSSES[objective.config.loss or ""].contrasts or objective.kind == "class"
    )
    if compares_rows and len(positions) > 1 and len(step) - positions[-1] == 1:
        positions.pop()
    return list(map(slice, positions, [*positions[1:], len(step)]))


class _WholeMeter:
    def update(self, *_: Any) -> None:
        """Raise `TypeError`: metrics need the vectors of all texts, not one batch."""
        raise TypeError("metrics need the vectors of all texts")

    merge = update


@dataclass
class QueryMeter(_WholeMeter):
    """Meter that averages metrics over queries; `values` has metric → value for each query.

    For a single query, `details` has the scores of its best positive and best negative document,
    and that negative document as `retrieved`. Means count the query of several rows once.
    """

    values: list[Mapping[str, float]]
    details: Mapping[str, Any] = field(default_factory=dict)
    is_repeated: bool = False

    def pool(self, meters: Sequence[QueryMeter]) -> QueryMeter:
        return QueryMeter([v for meter in meters if not meter.is_repeated for v in meter.values])

    def compute(self, _: float) -> dict[str, float]:
        non_empty = [value for value in self.values if value]
        names = non_empty[0] if non_empty else ()
        return {name: float(np.mean([value[name] for value in non_empty])) for name in names}

    def describe(self, _: Sequence[str]) -> dict[str, Any]:
        """Returns the metrics and details of a single query."""
        return {**{name: round(v, 4) for name, v in self.values[0].items()}, **self.details}


@dataclass
class PairMeter(_WholeMeter):
    """Meter of pairs of texts: Spearman correlation or average precision of similarities.

    `labels` are `(pairs,)`; `scores` maps a suffix, such as `_dim_64`, to similarities `(pairs,)`.
    """

    kind: LabelKind
    labels: np.ndarray
    scores: Mapping[str, np.ndarray]

    def pool(self, meters: Sequence[PairMeter]) -> PairMeter:
        scores = {name: np.concatenate([m.scores[name] for m in meters]) for name in self.scores}
        return PairMeter(self.kind, np.concatenate([m.labels for m in meters]), scores)

    def compute(self, _: float) -> dict[str, float]:
        """Returns metric → value; omits metrics of constant labels or constant similarities."""
        compute = spearman if self.kind == "score" else average_precision
        metrics = {}
        for suffix, scores in self.scores.items():
            if _varies(self.labels) and _varies(scores):
                metrics[f"{METRICS[self.kind][0]}{suffix}"] = compute(scores, self.labels)
        return metrics

    def resampler(
        self, meters: Sequence[PairMeter]
    ) -> Callable[[np.ndarray], dict[str, float]] | None:
        """Returns a function: number of draws per meter → metrics; None if labels are scores."""
        if self.kind == "score":
            return None
        pooled, name = self.pool(meters), METRICS[self.kind][0]
        owners = np.repeat(np.arange(len(meters)), [len(meter.labels) for meter in meters])
        functions = {
            f"{name}{suffix}": resampled_precision(scores, pooled.labels, owners)
            for suffix, scores in pooled.scores.items()
        }

        def compute(counts: np.ndarray) -> dict[str, float]:
            values = {key: function(counts) for key, function in functions.items()}
            return {key: value for key, value in values.items() if value is not None}

        return compute

    def describe(self, _: Sequence[str]) -> dict[str, Any]:
        """Returns the similarity and the label of the first pair."""
        if not len(self.labels):
            return {"similarity": float("nan"), "true": float("nan")}
        return {"similarity": round(float(self.scores[""][0]), 4), "true": float(self.labels[0])}


def _varies(values: np.ndarray) -> bool:
    return len(values) > 0 and bool((values != values[0]).any())


def create_meters(
    objective: Embeddings,
    vectors: torch.Tensor,
    step: StepTexts,
    dims: Sequence[int | None],
    search_ids: Sequence[int] = (),
) -> list[Any]:
    """Create a meter per row, with metrics of the first n dimensions for n in `dims` (None: all).

    Queries search the texts at indices `search_ids`; if empty, the documents of the rows.
    """
    spaces = {"" if count is None else f"_dim_{count}": vectors[:, :count] for count in dims}
    if objective.kind == "ranking":
        return _query_meters(objective.format.similarity, spaces, step, search_ids)
    if objective.format.similarity == "cosine":
        spaces = {name: functional.normalize(space, dim=-1) for name, space in spaces.items()}
    if objective.kind == "class":
        return _class_meters(spaces, step)
    return [
        _pair_meter(objective.kind, spaces, row_vectors[0], row_vectors[1:], labels)
        for row_vectors, labels in zip(step.texts, step.labels, strict=True)
    ]


def _class_meters(spaces: Mapping[str, torch.Tensor], step: StepTexts) -> list[PairMeter]:
    """Returns a meter per text, of its pairs with later texts; `spaces`: suffix → embeddings."""
    texts = [text for text, *_ in step.texts]
    groups = np.array(step.labels)[:, 0]
    return [
        _pair_meter("class", spaces, text, texts[at + 1 :], groups[at + 1 :] == groups[at])
        for at, text in enumerate(texts)
    ]


def _pair_meter(
    kind: LabelKind,
    spaces: Mapping[str, torch.Tensor],
    one: int,
    others: Sequence[int],
    labels: Any,
) -> PairMeter:
    scores = {
        name: (vectors[list(others)] @ vectors[one]).numpy() for name, vectors in spaces.items()
    }
    return PairMeter(kind, np.asarray(labels), scores)


def _query_meters(
    similarity: str, spaces: Mapping[str, torch.Tensor], step: StepTexts, search_ids: Sequence[int]
) -> list[QueryMeter]:
    """Returns one meter per dataset row, with the retrieval metrics of the query in that row."""
    documents = sorted(
        {
            document
            for row_vectors, labels in zip(step.texts, step.labels, strict=True)
            for document, label in zip(row_vectors[1:], labels, strict=True)
            if label > 0 or not search_ids
        }
        | set(search_ids)
    )
    position = {document: at for at, document in enumerate(documents)}
    relevant_ids: dict[int, dict[int, float]] = {}
    for (query, *row_vectors), labels in zip(step.texts, step.labels, strict=True):
        grades = relevant_ids.setdefault(query, {})
        for document, label in zip(row_vectors, labels, strict=True):
            if label > 0:
                grades[position[document]] = max(label, grades.get(position[document], label))
    queries = [query for query, grades in relevant_ids.items() if grades]
    values: dict[int, dict[str, float]] = {query: {} for query in relevant_ids}
    main_metric = METRICS["ranking"][0]
    for suffix, space in spaces.items():
        relevant = [relevant_ids[query] for query in queries]
        meters = score_retrieval(space[queries], space[documents], relevant, similarity=similarity)
        for name, scores in meters.values.items():
            if not suffix or name == main_metric:
                for query, value in zip(queries, scores.tolist(), strict=True):
                    values[query][f"{name}{suffix}"] = value
    details = _score_details(similarity, spaces[""], relevant_ids, queries, documents)
    first = {query: row for row, (query, *_) in reversed([*enumerate(step.texts)])}
    return [
        QueryMeter([values[query]], details.get(query, {}), first[query] != row)
        for row, (query, *_) in enumerate(step.texts)
    ]


def _score_details(
    similarity: str,
    vectors: torch.Tensor,
    relevant: Mapping[int, Mapping[int, float]],
    queries: Sequence[int],
    documents: Sequence[int],
) -> dict[int, dict[str, Any]]:
    details: dict[int, dict[str, Any]] = {}
    for start, scores in iterate_scores(vectors[queries], vectors[documents], similarity):
        for query, line in zip(queries[start:], scores, strict=False):
            positives = sorted(relevant[query])
            best = float(line[positives].max())
            line[positives] = -torch.inf
            if len(positives) < len(documents):
                details[query] = {
                    "positive_score": round(best, 4),
                    "negative_score": round(float(line.max()), 4),
                    "retrieved": documents[int(line.argmax())],
                }
    return details


def embed_rows(
    model: InferenceModel, texts: Sequence[EmbeddingRow], report: Report
) -> torch.Tensor:
    """Returns the float32 embeddings `(texts, dims)` of `texts`; calls `report` for progress."""
    result: list[np.ndarray] = []
    for start in range(0, len(texts), WINDOW):
        window = [replace(row, row=at) for at, row in enumerate(texts[start : start + WINDOW])]
        answers = model.task.predict(model, window, OutputOptions())
        result += [answer.columns[""] for answer in answers]
        report(len(result), len(result) / len(texts))
    return torch.from_numpy(np.stack(result))


def as_document(text: str) -> EmbeddingRow:
    """Returns `text` as a row that is embedded with the document prompt."""
    return EmbeddingRow("", 0, (text,), (0.0,))
