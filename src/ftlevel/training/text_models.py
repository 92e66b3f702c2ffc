"""Guide and teacher of embedding models and rerankers, run before the trained model loads.

They read the texts of rows, not tokens, so they may have another tokenizer. A guide embeds every
text, so that the GIST loss can find false negatives. A teacher scores every query's documents: an
embedding model by similarity, a reranker by its logit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ftlevel.config.section import Choice
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.encoding.texts import EncodedTexts
from ftlevel.data.sources.lines import RowView
from ftlevel.errors import InputError
from ftlevel.evaluation import embeddings
from ftlevel.evaluation.answers import InferenceModel
from ftlevel.events import Listener
from ftlevel.tasks.embedding.formats import EmbeddingRow
from ftlevel.tasks.embedding.objective import Embeddings
from ftlevel.tasks.reranking.losses import Ranking
from ftlevel.tasks.reranking.rows import RankedRow
from ftlevel.tasks.reranking.task import RerankingTask
from ftlevel.trained.generation import GenerationOptions, batches
from ftlevel.trained.model_ref import LoadedModel
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes

_WINDOW = 1_000
"""Rows whose documents a reranker encodes together."""


def with_text_models(run: Run, listener: Listener, processes: Processes) -> Run:
    """Returns the run, with guide vectors or teacher scores in its rows if these are configured.

    Each of several processes computes some texts, in other batches than one process would: vectors
    and scores may differ in rounding.
    """
    if not isinstance(run.objective, Embeddings | Ranking):
        return run
    for path, model in run.auxiliary.items():
        flag = path.rpartition(".")[2]
        listener.stage(f"running the {flag}")
        loaded, data = model.ref.load(run.model.device), run.data
        if flag == "guide":
            data = replace(data, train=embed_rows(data.train, loaded, processes))
        else:
            train, validation = (
                score_rows(rows, loaded, processes) for rows in (data.train, data.validation)
            )
            data = replace(data, train=train, validation=validation)
        num_texts = len({text for row in data.train for text in _words(row)})
        listener.choices(
            "train", [Choice(flag, model.name, f"{num_texts:,} texts, {model.ref.task}")]
        )
        run = replace(run, data=data)
    return run


@dataclass(frozen=True)
class GuidedTexts(EncodedTexts):
    """Row of encoded texts; `vectors` has the guide model's embedding of each text."""

    vectors: Any = field(default=None, metadata={"column": "json"})

    @property
    def guide(self) -> Any:
        """The guide model's vector of each text; None without a guide."""
        return self.vectors


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
        return GuidedTexts(**{**values, "vectors": vectors})

    return RowsWithOutputs(rows, _embed_words(rows, model, processes), combine)


def score_rows(
    rows: Sequence[Encoded], model: LoadedModel, processes: Processes
) -> RowsWithOutputs:
    """Returns `rows` with the score that `model` computes for each document in a row."""
    if isinstance(model.task, RerankingTask):
        scores = _score_with_reranker(rows, model, model.task, processes)
    else:
        objective = model.objective
        is_cosine = isinstance(objective, Embeddings) and objective.format.similarity == "cosine"
        vectors = _embed_words(rows, model, processes)
        scores = [_compute_similarity(own, is_cosine) for own in vectors]
    return RowsWithOutputs(rows, scores, lambda row, own: row.with_teacher(own))


def _compute_similarity(vectors: Tensor, is_cosine: bool) -> tuple[float, ...]:
    vectors = functional.normalize(vectors, dim=-1) if is_cosine else vectors
    return tuple((vectors[1:] @ vectors[0]).tolist())


def _words(row: Encoded) -> tuple[str, ...]:
    return row.words if isinstance(row, EncodedTexts | RankedRow) else ()


def _score_with_reranker(
    rows: Sequence[Encoded], loaded: LoadedModel, task: RerankingTask, processes: Processes
) -> list[tuple[float, ...]]:
    model = InferenceModel(loaded, GenerationOptions(1), None, truncate=True)

    def score(indices: Sequence[int]) -> list[tuple[float, ...]]:
        scores: list[tuple[float, ...]] = []
        for window in batches(indices, _WINDOW):
            words = [_words(rows[index]) for index in window]
            queries = [
                EmbeddingRow(query, at, tuple(documents), (0.0,) * len(documents))
                for at, (query, *documents) in enumerate(words)
            ]
            scores += map(tuple, task.score_documents(model, queries))
        return scores

    with model.inference():
        return processes.divide(score, range(len(rows)))


def _embed_words(rows: Sequence[Encoded], model: LoadedModel, processes: Processes) -> list[Tensor]:
    if not isinstance(model.objective, Embeddings):
        raise InputError(f"{model.task.name} is not the task of an embedding model.")
    indices_by_text: dict[tuple[str, bool], int] = {}
    indices = [
        [
            indices_by_text.setdefault((text, not at), len(indices_by_text))
            for at, text in enumerate(_words(row))
        ]
        for row in rows
    ]
    texts = [
        EmbeddingRow(text, 0) if is_query else embeddings.as_document(text)
        for text, is_query in indices_by_text
    ]
    embedder = InferenceModel(model, GenerationOptions(1), None, truncate=True)

    def embed(texts: Sequence[EmbeddingRow]) -> list[Any]:
        vectors = embeddings.embed_rows(embedder, texts, lambda *_: None) if texts else Tensor()
        return [*vectors.numpy()]

    with embedder.inference():
        vectors = torch.from_numpy(np.array(processes.divide(embed, texts)))
    return [vectors[own] for own in indices]
