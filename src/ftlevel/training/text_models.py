"""Embedding models beside the trained one: a guide that finds false negatives, and a teacher.

Both embed the distinct texts of the training rows once, before the trained model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import functional

from ftlevel.config.section import Choice
from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.texts import EncodedTexts
from ftlevel.data.sources.lines import LazySequence
from ftlevel.errors import InputError
from ftlevel.evaluation.embeddings import embed_texts
from ftlevel.events import Listener
from ftlevel.models.hardware import autocast
from ftlevel.tasks.embedding.formats import EmbeddingRow
from ftlevel.tasks.embedding.objective import Embeddings
from ftlevel.tasks.embedding.rows import TextEncoder
from ftlevel.trained.load import LoadedModel, load_ref
from ftlevel.trained.model_ref import ModelRef, resolve_model
from ftlevel.training.plan.run import Run


@dataclass(frozen=True)
class GuidedTexts(EncodedTexts):
    """Texts with the vector of each by a guide model."""

    vectors: Any = field(default=None, metadata={"column": "json"})

    @property
    def guide(self) -> Any:
        """Vector of each text by the guide model, or None."""
        return self.vectors


def find_text_models(run: Run) -> dict[str, ModelRef]:
    """Return flag → embedding model of `--guide` and `--teacher`, before weights load.

    Raises:
        InputError: a model does not exist, or is no embedding model.
    """
    if not isinstance(run.objective, Embeddings):
        return {}
    names = {"--guide": run.config.embedding.guide, "--teacher": run.config.distillation.teacher}
    return {
        flag: resolve_model(
            name,
            "embedding",
            device=run.model.device,
            dtype=run.model.dtype,
            said=f"{flag} {name}",
        )
        for flag, name in names.items()
        if name is not None
    }


def with_text_models(run: Run, listener: Listener) -> Run:
    """Return the run with training rows that have the guide's vectors or the teacher's scores."""
    for flag, found in find_text_models(run).items():
        listener.stage(f"embedding the texts with the {flag.removeprefix('--')}")
        rows = EmbeddedRows(run.data.train, load_ref(found, run.model.device), flag == "--guide")
        listener.choices("train", [Choice(flag[2:], found.base, f"{rows.texts:,} texts embedded")])
        run = replace(run, data=replace(run.data, train=rows))
    return run


class EmbeddedRows(LazySequence[Encoded]):
    """Rows with the vectors of `model`, or with scores of their documents from these."""

    def __init__(self, rows: Sequence[Encoded], model: LoadedModel, guides: bool) -> None:
        self.rows, self._guides = rows, guides
        objective = model.objective
        if not isinstance(objective, Embeddings):
            raise InputError(f"{model.task.name} is not the task of an embedding model.")
        self._is_cosine = objective.form.similarity == "cosine"
        known: dict[tuple[str, bool], int] = {}
        self._places: list[list[int]] = []
        for row in rows:
            words = row.words if isinstance(row, EncodedTexts) else ()
            self._places.append(
                [known.setdefault((text, not at), len(known)) for at, text in enumerate(words)]
            )
        self.texts = len(known)
        self._vectors = _embed(model, objective, list(known))

    def __len__(self) -> int:
        return len(self.rows)

    def _item(self, at: int) -> Encoded:
        row, vectors = self.rows[at], self._vectors[self._places[at]]
        if not isinstance(row, EncodedTexts):
            raise TypeError("a guide embeds texts")
        if self._guides:
            fields = {name: getattr(row, name) for name in row.__dataclass_fields__}
            return GuidedTexts(**{**fields, "vectors": vectors})
        if self._is_cosine:
            vectors = functional.normalize(vectors, dim=-1)
        return replace(row, teacher_scores=tuple((vectors[1:] @ vectors[0]).tolist()))


def _embed(
    model: LoadedModel, objective: Embeddings, texts: Sequence[tuple[str, bool]]
) -> torch.Tensor:
    """Return the vectors `(texts, dims)` of queries (True) and documents (False)."""
    form, end = objective.form, model.options["embedding"].get("end")
    encode = TextEncoder(model.tokenizer, form.query_prompt, form.document_prompt, end)
    most = form.max_length or model.max_length
    rows: list[Encoded] = []
    for text, is_query in texts:
        example = EmbeddingRow(text, 0) if is_query else EmbeddingRow("", 0, (text,), (0.0,))
        (row,) = encode([example])
        short = row.truncated(most) if most else row
        rows.append((short or row).branches[-1])
    with torch.no_grad(), autocast(model.device, model.dtype):
        return embed_texts(
            model.model, objective, rows, model.tokenizer.pad_token_id or 0, model.device
        )
