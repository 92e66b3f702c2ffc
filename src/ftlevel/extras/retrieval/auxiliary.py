"""Guide and teacher of embedding models and rerankers, run before the trained model loads.

They read the texts of rows, not tokens, so they may have another tokenizer. A guide embeds every
text, so that the GIST loss can find false negatives. A teacher scores every query's documents: an
embedding model by similarity, a reranker by its logit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ftlevel.config.section import Choice
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.sources.lines import RowView
from ftlevel.errors import InputError
from ftlevel.evaluation.answers import InferenceModel
from ftlevel.events import Listener
from ftlevel.extras.retrieval.embedding import get_task_of_texts
from ftlevel.extras.retrieval.evaluation import as_document
from ftlevel.extras.retrieval.evaluation import embed_rows as embed_texts
from ftlevel.extras.retrieval.formats import EmbeddingRow
from ftlevel.extras.retrieval.objective import Embeddings
from ftlevel.extras.retrieval.reranking import RerankingTask
from ftlevel.extras.retrieval.rows import EncodedTexts
from ftlevel.models.loading import load_config
from ftlevel.trained.generation import GenerationOptions, batches
from ftlevel.trained.model_ref import LoadedModel
from ftlevel.trained.resolve import (
    ReferenceModel,
    compute_fingerprint,
    get_model_dir,
    resolve_model,
)
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes

_WINDOW = 1_000
"""Rows whose documents a reranker encodes together."""


GUIDE = ("embedding", "guide")


def resolve_text_model(flag: str, name: str, device: str, dtype: str) -> ReferenceModel:
    """Resolve the guide or teacher `name` of `flag`; it reads texts, so its tokenizer may differ.

    Its fingerprint also covers pooling, normalization and prompts. Raises InputError if it does not
    exist, or is neither an embedding model nor, as a teacher, a reranker.
    """
    label = f"{flag} {name}"
    ref = resolve_model(name, device=device, dtype=dtype, label=label, require_task=False)
    task = ref.task or get_task_of_texts(get_model_dir(name), load_config(ref.source))
    allowed = ("embedding",) if flag == "--guide" else ("embedding", "reranking")
    if task not in allowed:
        raise InputError(
            f"{label} was trained for {task}. Name a model for {' or '.join(allowed)}."
        )
    if not ref.task:
        ref = resolve_model(name, task, device=device, dtype=dtype, label=label)
    content = json.dumps([compute_fingerprint(ref), ref.card.options], sort_keys=True, default=str)
    return ReferenceModel(name, ref, hashlib.sha256(content.encode()).hexdigest())


def with_text_models(run: Run, listener: Listener, processes: Processes) -> Run:
    """Returns the run, with guide vectors or teacher scores in its rows if these are configured.

    Each of several processes computes some texts, in other batches than one process would: vectors
    and scores may differ in rounding.
    """
    models = {"guide": run.auxiliary.others.get(GUIDE), "teacher": run.auxiliary.teacher}
    for flag, model in models.items():
        if model is None:
            continue
        listener.stage(f"running the {flag}")
        loaded, data = model.ref.load(run.model.device), run.data
        if flag == "guide":
            data = replace(data, train=embed_rows(data.train, loaded, processes))
        else:
            train, validation = (
                score_rows(rows, loaded, processes) for rows in (data.train, data.validation)
            )
            data = replace(data, train=train, validation=validation)
        rows: Sequence[Any] = data.train
        num_texts = len({text for row in rows for text in row.words})
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
    if not isinstance(model.objective, Embeddings):
        raise InputError(f"{model.task.name} is not the task of an embedding model.")
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
