"""Pooling of token states, and the objective of a step's vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftlevel.config.section import Choice
from ftlevel.extras.retrieval.config import EMBEDDING_LOSSES, EmbeddingConfig
from ftlevel.extras.retrieval.metrics import METRICS as RETRIEVAL
from ftlevel.extras.retrieval.rows import StepTexts, distinct_texts
from ftlevel.extras.retrieval.sentence_transformers import EmbeddingFormat
from ftlevel.objectives import Collate, Meter, Objective

if TYPE_CHECKING:
    import torch

    from ftlevel.extras.retrieval.embedding_losses import LossConfig

LabelKind = Literal["ranking", "score", "label", "class"]
"""Meaning of labels: relevance of documents, scores of pairs, 0 or 1 of pairs, or classes."""

METRICS: dict[LabelKind, tuple[str, ...]] = {
    "ranking": RETRIEVAL,
    "score": ("spearman",),
    "label": ("ap",),
    "class": ("ap",),
}
"""Metrics by the meaning of labels, the headline first."""

EVALUATED_ROWS = 64
"""Rows per group of the validation loss if the rows per step are unknown."""


def without_first(mask: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Returns `mask` `(texts, seq)` with 0 for the first `counts[i]` tokens of text i."""
    if not any(counts):
        return mask
    import torch

    from ftlevel.models.hardware import send

    return mask * (mask.cumsum(1) > send(torch.tensor(counts), mask.device)[:, None])


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Returns one float32 vector per text, `(texts, width)`; `pooling` is mean, cls, last or max.

    `states` are `(texts, seq, width)`, possibly after states of virtual tokens, which are skipped.
    `mask` `(texts, seq)` is 1 for a token; padding may be on either side. cls is the first token.
    """
    import torch

    states = states[:, states.shape[1] - mask.shape[1] :].float()
    if pooling == "mean":
        weights = mask.to(states.dtype)
        return torch.einsum("tsw,ts->tw", states, weights) / weights.sum(1, keepdim=True)
    if pooling == "max":
        return states.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
    positions = torch.arange(mask.shape[1], device=mask.device) * (mask != 0)
    at = positions.argmax(1) if pooling == "last" else (mask != 0).int().argmax(1)
    return states[torch.arange(len(states), device=states.device), at]


@dataclass(frozen=True)
class Embeddings(Objective):
    """Objective of embedding models: pools token states to vectors; one loss per optimizer step.

    Attributes:
        config: loss and its settings; `loss` is not None.
        format: pooling, normalization and similarity.
        kind: kind of the rows' labels: ranking, score, label (0 or 1) or class.
        step_rows: rows per optimizer step; the validation loss uses groups of this size.
    """

    config: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    format: EmbeddingFormat = field(default_factory=EmbeddingFormat)
    kind: LabelKind = "ranking"
    step_rows: int = EVALUATED_ROWS
    has_choice: ClassVar[bool] = False
    evaluates_first: ClassVar[bool] = True
    needs_whole_step: ClassVar[bool] = True
    shard_limitation: ClassVar[str] = "it was never tried on a sharded model"

    @property
    def metrics(self) -> tuple[str, ...]:
        dims = self.config.matryoshka_dims
        return (*METRICS[self.kind], *(f"{self.headline}_dim_{count}" for count in dims))

    def embed(self, outputs: Any, mask: torch.Tensor, unpooled: Sequence[int] = ()) -> torch.Tensor:
        """Returns float32 embeddings `(texts, dims)`; skips the first `unpooled[i]` of text i."""
        return self.embed_states(self.logits(outputs), without_first(mask, unpooled))

    def logits(self, outputs: Any) -> torch.Tensor:
        """Returns the hidden states of the last layer, `(texts, seq, width)`."""
        states: torch.Tensor = outputs.last_hidden_state
        return states

    def embed_states(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns embeddings `(texts, dims)` of states `(texts, seq, width)`, as `format` says."""
        import torch
        from torch.nn import functional

        with torch.autocast(states.device.type, enabled=False):
            vectors = pool(states, mask, self.format.pooling)
            if self.format.normalize:
                vectors = functional.normalize(vectors, dim=-1)
            return vectors[:, : self.format.dims]  # last, as in sentence-transformers

    def step_loss(self, vectors: torch.Tensor, step: StepTexts) -> torch.Tensor:
        """Returns the mean loss over rows; for Matryoshka dimensions, a weighted sum of losses."""
        import torch

        from ftlevel.extras.retrieval.embedding_losses import STEP_LOSSES

        compute = STEP_LOSSES[self.config.loss or ""]
        with torch.autocast(vectors.device.type, enabled=False):
            losses = [
                weight * compute(space, step, self._loss_config)
                for space, weight in self._weighted_spaces(vectors)
            ]
            return torch.stack(losses).sum()

    def _weighted_spaces(self, vectors: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
        from torch.nn import functional

        dims = self.config.matryoshka_dims
        if not dims:
            return [(vectors.float(), 1.0)]
        spaces = [functional.normalize(vectors[:, :count].float(), dim=-1) for count in dims]
        return list(zip(spaces, self.config.matryoshka_weights or (1.0,) * len(dims), strict=True))

    @property
    def has_row_losses(self) -> bool:
        """Whether the loss is a mean of terms of single rows, not of pairs of rows."""
        from ftlevel.extras.retrieval.embedding_losses import LOSS_TERMS

        return self.config.loss in LOSS_TERMS and self.kind != "class"

    def row_losses(self, vectors: torch.Tensor, step: StepTexts) -> list[float | None]:
        """Returns each row's part of the loss, None for rows without a term.

        Their mean is the loss, whose terms have equal weight. Needs `has_row_losses`.
        """
        import torch

        from ftlevel.extras.retrieval.embedding_losses import LOSS_TERMS

        compute = LOSS_TERMS[self.config.loss or ""]
        sums, rows = torch.zeros(len(step), device=vectors.device), set[int]()
        with torch.autocast(vectors.device.type, enabled=False):
            for space, weight in self._weighted_spaces(vectors):
                terms, of_term = compute(space, step, self._loss_config)
                index = torch.tensor(of_term, dtype=torch.long, device=sums.device)
                sums.index_add_(0, index, weight * terms / max(len(terms), 1))
                rows |= set(of_term)
        return [
            value * len(rows) if row in rows else None for row, value in enumerate(sums.tolist())
        ]

    def for_validation(self, step: StepTexts) -> Embeddings:
        """Returns the objective; its loss is mnrl if `step` lacks negatives or scores for it."""
        config, properties = self.config, EMBEDDING_LOSSES[self.config.loss or ""]
        negatives = all(min(labels) <= 0 for labels in step.labels)
        if (
            (properties.needs_negatives and not negatives)
            or (properties.needs_teacher and not all(step.teacher))
            or ("guide" in properties.parameters and step.guide is None)
        ):
            changes = {"loss": "mnrl", "scale": None, "margin": None}
            return replace(self, config=config.model_copy(update=changes))
        return self

    def for_comparison(self, rows: Sequence[Any]) -> Embeddings:
        return self.for_validation(distinct_texts(rows)[1])

    def compare(
        self, model: Any, rows: Sequence[Any], collate: Collate
    ) -> tuple[torch.Tensor, float, int]:
        texts, step = distinct_texts(rows)
        vectors = self.embed_texts(model, texts, collate)
        mean = self.group_loss(vectors, step)
        return vectors, (mean or 0.0) * len(step), len(step) if mean is not None else 0

    def compute_whole_step(
        self, model: Any, rows: Sequence[Any], collate: Collate, batch_size: int
    ) -> torch.Tensor:
        import torch

        texts, step = distinct_texts(rows)
        parts = [texts[at : at + batch_size] for at in range(0, len(texts), batch_size)]
        vectors = [self.embed_texts(model, part, collate) for part in parts]
        return self.step_loss(torch.cat(vectors), step)

    def embed_texts(self, model: Any, texts: Sequence[Any], collate: Collate) -> torch.Tensor:
        """Returns the embeddings of encoded `texts` in one forward pass."""
        batch = collate(texts)
        del batch["labels"]
        return self.embed(
            model(**batch), batch["attention_mask"], [text.unpooled for text in texts]
        )

    def loss_sum(
        self, logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        raise TypeError("the loss needs all rows of a step")

    def meter(self) -> Meter:
        raise TypeError("metrics need the vectors of all texts")

    def describe_validation(self, rows: Sequence[Any], options: Mapping[str, Any]) -> list[Choice]:
        if not len(rows):
            return []
        loss = self.for_comparison(rows).config.loss
        is_own = "step_rows" in options.get("embedding", {})
        note = "the rows per step of training" if is_own else "the default"
        groups = f"{loss} within groups of {self.step_rows:,} rows"
        return [Choice("loss", groups, f"{note}; it depends on the size")]

    def group_loss(self, vectors: torch.Tensor, step: StepTexts) -> float | None:
        """Returns the mean loss over rows; None if the loss needs positives and no row has one."""
        needs_positives = (
            self.kind == "ranking" and not EMBEDDING_LOSSES[self.config.loss or ""].needs_teacher
        )
        if needs_positives and all(max(labels) <= 0 for labels in step.labels):
            return None
        return float(self.step_loss(vectors, step))

    @property
    def largest_term(self) -> float:
        """Upper bound of the similarities multiplied by `scale`."""
        return max(self._loss_config.scale, 1.0)

    @property
    def _loss_config(self) -> LossConfig:
        from ftlevel.extras.retrieval.embedding_losses import LossConfig

        config, properties = self.config, EMBEDDING_LOSSES[self.config.loss or ""]
        is_cosine = self.format.similarity == "cosine"
        is_bounded = is_cosine or config.loss == "angle"
        usual = (properties.scale or 1.0) if is_bounded else 1.0
        return LossConfig(
            scale=config.scale or usual,
            margin=config.margin if config.margin is not None else (properties.margin or 0.0),
            temperature=config.temperature,
            symmetric=config.symmetric,
            is_cosine=is_cosine,
            hides_repeats=config.batch_sampler == "no_duplicates",
        )
