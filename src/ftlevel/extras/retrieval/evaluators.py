"""Evaluators of embedding models and rerankers, and evaluation on retrieval sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftlevel.commands.evaluate import Score
from ftlevel.config.section import Choice
from ftlevel.data.encoding.row import Encoded
from ftlevel.errors import ConfigError
from ftlevel.evaluation.answers import InferenceModel
from ftlevel.evaluation.intervals import ExampleRecord
from ftlevel.evaluation.scoring import MAX_TEXT_LENGTH, Evaluator
from ftlevel.events import Listener
from ftlevel.extras.retrieval.beir import load_retrieval_set
from ftlevel.extras.retrieval.config import RetrievalOptions
from ftlevel.extras.retrieval.embedding import EmbeddingTask
from ftlevel.extras.retrieval.evaluation import (
    as_document,
    create_meters,
    embed_rows,
    embed_texts,
    get_loss_groups,
    step_losses,
)
from ftlevel.extras.retrieval.formats import EmbeddingRow
from ftlevel.extras.retrieval.metrics import METRICS, RetrievalScores, score_retrieval
from ftlevel.extras.retrieval.rows import add_texts, distinct_texts
from ftlevel.trained.generation import GenerationOptions
from ftlevel.trained.model_ref import LoadedModel, ModelRef
from ftlevel.trained.resolve import get_dtype_source


@dataclass(frozen=True)
class EmbeddingEvaluator(Evaluator):
    """Evaluator by search: queries search `corpus`, or if empty the rows' documents."""

    def for_other(self, model: LoadedModel, encode: Callable[[], Any]) -> Evaluator:
        """Returns a copy with the rows encoded for `model`, and its format of embeddings."""
        encoded, objective, task = encode(), self.objective, model.task
        return replace(
            self.with_model(model),
            objective=replace(objective, format=task.format),  # type: ignore[call-arg,attr-defined]
            rows=encoded.rows,
            corpus=encoded.corpus,
            tokenizer=model.tokenizer,
        )

    def score(self, model: Any, record: ExampleRecord | None) -> dict[str, float]:
        objective: Any = self.objective
        corpus: Any = self.corpus
        texts, step = distinct_texts(self.rows)
        search_ids = add_texts(texts, corpus)
        pad_id = self.tokenizer.pad_token_id or 0
        vectors = embed_texts(model, objective, texts, pad_id, self.device, self.divide)
        losses = step_losses(objective, vectors, step)
        if record is not None and not objective.for_validation(step).has_row_losses:
            for number, group in enumerate(get_loss_groups(objective, step)):
                record.loss_groups |= {row.row: number for row in self.rows[group]}
        dims = (None, *objective.config.matryoshka_dims)
        with torch.autocast("cpu", enabled=False):
            meters = create_meters(objective, vectors, step, dims, search_ids)
        if record is not None:
            for row, loss, meter in zip(self.rows, losses, meters, strict=True):
                if "retrieved" in getattr(meter, "details", {}):
                    text = self.text(texts[meter.details["retrieved"]])
                    meter.details = {**meter.details, "retrieved": text[:MAX_TEXT_LENGTH]}
                record.add_row(row.row, loss or 0.0, int(loss is not None), meter)
        defined = [loss for loss in losses if loss is not None]
        loss = float(np.mean(defined)) if defined else math.nan
        return {"loss": loss, **meters[0].pool(meters).compute(loss)}

    def get_texts(self, row: Encoded) -> dict[str, str]:
        first, *others = row.sequences
        if not others:
            return {"input": self.text(first)}
        return {"query": self.text(first), "document": self.text(others[0])}


@dataclass(frozen=True)
class RerankingEvaluator(Evaluator):
    """Evaluator of rerankers."""

    def get_texts(self, row: Encoded) -> dict[str, str]:
        return {}

    def get_result_texts(self, row: Any, line: dict[str, Any]) -> dict[str, str]:
        """Returns the query, the most relevant document, and the best-scored irrelevant one."""
        ends = accumulate(row.sizes, initial=row.query)
        documents = [row.input_ids[start:end] for start, end in pairwise(ends)]
        irrelevant = [at for at, label in enumerate(row.relevance) if label <= 0]
        ids = {"query": row.input_ids[: row.query]}
        if max(row.relevance) > 0:
            ids["document"] = documents[row.relevance.index(max(row.relevance))]
        for name in ("base_", ""):
            scores = line.get(f"{name}scores", [])
            if irrelevant and len(scores) == len(documents):
                ids[f"{name}retrieved"] = documents[max(irrelevant, key=scores.__getitem__)]
        return {name: self.decode(own) for name, own in ids.items()}


class RetrievalData:
    """Queries and documents of a retrieval set, which embedding models search."""

    headline = METRICS[0]

    def __init__(self, config: RetrievalOptions, ref: ModelRef) -> None:
        self.config, self.ref, self.qrels = config, ref, config.qrels or Path()
        self.num_truncated = 0
        self.data = load_retrieval_set(self.qrels, config.corpus)
        if not isinstance(ref.configured_task, EmbeddingTask):
            raise ConfigError(
                f"--qrels: {config.name} is of --task {ref.task}, and a search needs an "
                "embedding model. Name one, or add --task embedding."
            )

    def choices(self, trained: LoadedModel) -> list[Choice]:
        data = self.data
        sizes = f"{len(data.queries):,} queries, {len(data.documents):,} documents"
        return [
            Choice("task", self.ref.task),
            Choice("base", self.ref.base),
            Choice("retrieval set", str(self.qrels), sizes),
            Choice("dtype", trained.dtype, get_dtype_source(trained.ref, self.config.dtype)),
        ]

    def list_warnings(self, trained: LoadedModel) -> Iterator[str]:
        if merged := self.data.merged:
            yield f"{merged:,} documents repeat the text of another document and are counted once."
        if unjudged := self.data.unjudged:
            yield f"{unjudged:,} queries without a relevant document are skipped."

    def score(self, model: LoadedModel, listener: Listener) -> Score:
        listener.stage("embedding and searching")
        task: Any = model.task
        loaded = InferenceModel(model, GenerationOptions(1), self.config.batch_size, truncate=True)
        queries = [EmbeddingRow(query, 0) for query in self.data.queries]
        texts = [*queries, *map(as_document, self.data.documents)]
        with loaded.inference():
            vectors = embed_rows(loaded, texts, listener.answered)
        self.num_truncated = self.num_truncated or loaded.shortened
        values: dict[str, np.ndarray] = {}
        for dims in (None, *task.config.matryoshka_dims):
            scores = score_retrieval(
                vectors[: len(queries), :dims],
                vectors[len(queries) :, :dims],
                self.data.relevant,
                similarity=task.format.similarity,
            )
            names = METRICS if dims is None else METRICS[:1]
            suffix = "" if dims is None else f"_dim_{dims}"
            values |= {f"{name}{suffix}": scores.values[name] for name in names}
        found = RetrievalScores(values)
        return Score(found.means, found.resample)

    score_base = score_other = score

    def compute_outputs(self, trained: LoadedModel) -> tuple[None, None]:
        return None, None

    def list_results(self, trained: LoadedModel, metrics: Any) -> Iterator[str]:
        if self.num_truncated:
            yield f"{self.num_truncated:,} texts exceed the maximum length and are truncated."

    def describe(self) -> dict[str, Any]:
        data = self.data
        return {
            "name": str(self.qrels),
            "split": f"{len(data.documents):,} documents",
            "examples": len(data.queries),
            "merged": data.merged,
            "unjudged": data.unjudged,
        }
