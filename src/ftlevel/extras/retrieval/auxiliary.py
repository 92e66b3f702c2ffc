"""Guide and teacher of embedding models and rerankers, run before the trained model loads.

They read the texts of rows, not tokens, so they may have another tokenizer. A guide embeds every
text, so that the GIST loss can find false negatives. A teacher scores every query's documents: an
embedding model by similarity, a reranker by its logit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ftlevel.data.encoding.row import Encoded
from ftlevel.data.sources.lines import RowView
from ftlevel.evaluation.answers import InferenceModel
from ftlevel.extras.retrieval.evaluation import as_document
from ftlevel.extras.retrieval.evaluation import embed_rows as embed_texts
from ftlevel.extras.retrieval.formats import EmbeddingRow
from ftlevel.extras.retrieval.reranking import RerankingTask
from ftlevel.extras.retrieval.rows import EncodedTexts
from ftlevel.trained.generation import GenerationOptions, batches
from ftlevel.trained.model_ref import LoadedModel
from ftlevel.training.processes import Processes

_WINDOW = 1_000
"""Rows whose documents a reranker encodes together."""


@dataclass(frozen=True)
class GuidedTexts(EncodedTexts):
    """Row of encoded texts; `guide` has the guide model's embedding of each text."""

    guide: Any = field(default=None, metadata={"column": "json"})  # type: ignore[misc]


class RowsWithOutputs(RowView[Encoded]):
    """Rows and a model's output for each; reading a row combines the row with the output."""

    def __init__(
        self,
        rows: Sequence[Encoded],
        outputs: Sequence[Any],
        combine: Callable[[Any, Any], Encoded],
    ) -> None:
        self.rows, self._outputs, self._combine = rows, outputs, combine

    def _item(self, at: int) -> Encoded:
        return self._combine(self.rows[at], self._outputs[at])


def embed_rows(
    rows: Sequence[Encoded], model: LoadedModel, processes: Processes
) -> RowsWithOutputs:
    """Returns `rows` with the vector that `model` computes for each text in a row."""

    def combine(row: EncodedTexts, vectors: Tensor) -> Encoded:
        values = {each.name: getattr(row, each.name) for each in fields(row)}
        return GuidedTexts(**{**values, "guide": vectors})

    return RowsWithOutputs(rows, _embed_words(rows, model, processes), combine)


def score_rows(
    rows: Sequence[Encoded], model: LoadedModel, processes: Processes
) -> RowsWithOutputs:
    """Returns `rows` with the score that `model` computes for each document in a row."""
    if isinstance(model.task, RerankingTask):
        scores = _score_with_reranker(rows, model, model.task, processes)
    else:
        task: Any = model.task
        is_cosine = task.format.similarity == "cosine"
        vectors = _embed_words(rows, model, processes)
        scores = [_compute_similarity(own, is_cosine) for own in vectors]
    return RowsWithOutputs(rows, scores, lambda row, own: row.with_teacher(own))


def _compute_similarity(vectors: Tensor, is_cosine: bool) -> tuple[float, ...]:
    vectors = functional.normalize(vectors, dim=-1) if is_cosine else vectors
    return tuple((vectors[1:] @ vectors[0]).tolist())


def _score_with_reranker(
    rows: Sequence[Any], loaded: LoadedModel, task: RerankingTask, processes: Processes
) -> list[tuple[float, ...]]:
    model = InferenceModel(loaded, GenerationOptions(1), None, truncate=True)

    def score(indices: Sequence[int]) -> list[tuple[float, ...]]:
        scores: list[tuple[float, ...]] = []
        for window in batches(indices, _WINDOW):
            words = [rows[index].words for index in window]
            queries = [
                EmbeddingRow(query, at, tuple(documents), (0.0,) * len(documents))
                for at, (query, *documents) in enumerate(words)
            ]
            scores += map(tuple, task.score_documents(model, queries))
        return scores

    with model.inference():
        return processes.divide(score, range(len(rows)))


def _embed_words(rows: Sequence[Any], model: LoadedModel, processes: Processes) -> list[Tensor]:
    indices_by_text: dict[tuple[str, bool], int] = {}
    indices = [
        [
            indices_by_text.setdefault((text, not at), len(indices_by_text))
            for at, text in enumerate(row.words)
        ]
        for row in rows
    ]
    texts = [
        EmbeddingRow(text, 0) if is_query else as_document(text)
        for text, is_query in indices_by_text
    ]
    embedder = InferenceModel(model, GenerationOptions(1), None, truncate=True)

    def embed(texts: Sequence[EmbeddingRow]) -> list[Any]:
        vectors = embed_texts(embedder, texts, lambda *_: None) if texts else Tensor()
        return [*vectors.numpy()]

    with embedder.inference():
        vectors = torch.from_numpy(np.array(processes.divide(embed, texts)))
    return [vectors[own] for own in indices]
