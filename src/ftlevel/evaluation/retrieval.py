"""Embed texts with a loaded model, and evaluate it on a retrieval set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from ftlevel.data.sources.beir import RetrievalSet
from ftlevel.evaluation.answers import InferenceModel
from ftlevel.tasks.base import OutputOptions
from ftlevel.tasks.embedding.formats import EmbeddingRow
from ftlevel.tasks.embedding.retrieval import METRICS, RetrievalScores, score_retrieval
from ftlevel.tasks.embedding.task import EmbeddingTask
from ftlevel.trained.generation import GenerationOptions
from ftlevel.trained.model_ref import LoadedModel

WINDOW = 2_048
"""Number of texts that are sorted by length together."""

Report = Callable[[int, float | None], None]
"""Function that is called with the number of embedded texts, and their fraction of all."""


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


def evaluate_retrieval(
    trained: LoadedModel, data: RetrievalSet, batch_size: int | None, report: Report
) -> tuple[RetrievalScores, int]:
    """Returns the metrics of each query of `data`, and the number of truncated texts."""
    task = trained.task
    if not isinstance(task, EmbeddingTask):
        raise TypeError("only embedding models search")
    model = InferenceModel(trained, GenerationOptions(1), batch_size, truncate=True)
    queries = [EmbeddingRow(query, 0) for query in data.queries]
    with model.inference():
        vectors = embed_rows(model, [*queries, *map(as_document, data.documents)], report)
    result: dict[str, np.ndarray] = {}
    for dims in (None, *task.config.matryoshka_dims):
        scores = score_retrieval(
            vectors[: len(queries), :dims],
            vectors[len(queries) :, :dims],
            data.relevant,
            similarity=task.format.similarity,
        )
        names = METRICS if dims is None else METRICS[:1]
        suffix = "" if dims is None else f"_dim_{dims}"
        result |= {f"{name}{suffix}": scores.values[name] for name in names}
    return RetrievalScores(result), model.shortened
