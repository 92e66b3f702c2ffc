"""Settings of embedding models: loss, pooling, prompts and batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ftlevel.config.section import TaskSection, list_unread
from ftlevel.errors import has_no_effect, join_names, needs

EMBEDDING_TASKS = ("embedding",)
DECODER_RATE, DECODER_RATES = 3.3, {"full": 9.0, "prefix": 1.0, "prompt": 1.0, "p-tuning": 1.0}
"""Factors on a method's default learning rate for decoders; `DECODER_RATE` is for other methods.

They are measured on small models in short runs (docs/embeddings.md). For large models in long runs,
the factor is 1: the rates are then those of papers.
"""
EmbeddingLossName = Literal[
    "mnrl", "gist", "cosent", "angle", "cosine", "contrastive", "triplet", "margin-mse", "kl"
]
Pooling = Literal["mean", "cls", "last", "max"]
Similarity = Literal["cosine", "dot"]
Columns = Literal["pairs", "scores"]
"""Content of a row: a query with documents, or two texts with a score or a label."""


@dataclass(frozen=True)
class EmbeddingLoss:
    """Properties of an embedding loss.

    Attributes:
        columns: columns that rows need for this loss.
        parameters: fields of `EmbeddingConfig` that this loss uses and not every loss uses.
        scale: default scale of cosine similarities; None if the loss has none.
        margin: default margin; None if the loss has none.
        contrasts: whether rows of a step are compared with each other, so a step needs two or more.
        needs_teacher: whether it needs scores of a teacher, as columns or from `--teacher`.
        label_range: lowest and highest allowed score of a pair; None if any is allowed.
    """

    columns: Columns
    parameters: tuple[str, ...] = ()
    scale: float | None = None
    margin: float | None = None
    contrasts: bool = False
    needs_negatives: bool = False
    needs_teacher: bool = False
    label_range: tuple[float, float] | None = None


LOSSES: dict[str, EmbeddingLoss] = {
    "mnrl": EmbeddingLoss("pairs", ("scale", "symmetric"), 20.0, contrasts=True),
    "gist": EmbeddingLoss("pairs", ("scale", "guide", "margin"), 100.0, 0.0, contrasts=True),
    "triplet": EmbeddingLoss("pairs", ("margin",), None, 5.0, needs_negatives=True),
    "margin-mse": EmbeddingLoss("pairs", needs_negatives=True, needs_teacher=True),
    "kl": EmbeddingLoss("pairs", ("temperature",), needs_negatives=True, needs_teacher=True),
    "cosent": EmbeddingLoss("scores", ("scale",), 20.0, contrasts=True),
    "angle": EmbeddingLoss("scores", ("scale",), 20.0, contrasts=True),
    "cosine": EmbeddingLoss("scores", label_range=(-1, 1)),
    "contrastive": EmbeddingLoss("scores", ("margin",), None, 0.5, label_range=(0, 1)),
}
PARAMETERS = {name: facts.parameters for name, facts in LOSSES.items()}
"""Loss → settings that it reads."""
DEFAULT_LOSSES: dict[Columns, str] = {"pairs": "mnrl", "scores": "cosent"}
LOSS_ALIASES = {
    "infonce": "mnrl",
    "multiplenegativesrankingloss": "mnrl",
    "cachedmultiplenegativesrankingloss": "mnrl",
    "gistembedloss": "gist",
    "cachedgistembedloss": "gist",
    "cosentloss": "cosent",
    "angleloss": "angle",
    "cosinesimilarityloss": "cosine",
    "contrastiveloss": "contrastive",
    "tripletloss": "triplet",
    "marginmseloss": "margin-mse",
    "distillkldivloss": "kl",
}
"""Other tools' loss name, in lower case without dashes and underscores → ftlevel's name."""


def normalize_loss_name(value: Any, aliases: Mapping[str, str]) -> Any:
    """Returns ftlevel's name of the loss `value` (`aliases`: other tools' names → ftlevel's)."""
    if not isinstance(value, str):
        return value
    key = value.lower().replace("_", "").replace("-", "")
    return aliases.get(key, value.lower().replace("_", "-"))


def _split_dims(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


Dims = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_split_dims)]


class EmbeddingConfig(TaskSection):
    """Settings of embedding models: loss, pooling, prompts and sampling."""

    tasks: ClassVar[tuple[str, ...]] = EMBEDDING_TASKS
    shorthand: ClassVar[str] = "loss"
    paths: ClassVar[Mapping[str, str]] = {"guide": "--guide"}
    pipeline_tags: ClassVar[Mapping[str, str]] = {"embedding": "sentence-similarity"}

    loss: (
        Annotated[
            EmbeddingLossName, BeforeValidator(partial(normalize_loss_name, aliases=LOSS_ALIASES))
        ]
        | None
    ) = Field(None, description="Embedding loss; default: mnrl for pairs, cosent for scores.")
    scale: Annotated[float, Field(gt=0, le=10_000)] | None = Field(
        None,
        description="Multiplier of similarities in the loss (1 / temperature); default: 20 (1 for"
        " dot products, 100 for gist).",
    )
    symmetric: bool = Field(
        False, description="Whether mnrl also compares each document with all queries."
    )
    margin: Annotated[float, Field(ge=0, le=1000)] | None = Field(
        None,
        description="Margin of the loss; default: 5 for triplet, 0.5 for contrastive, 0 for gist.",
    )
    temperature: Annotated[float, Field(gt=0, le=1000)] = Field(
        1.0, description="Temperature of the scores of teacher and model in kl."
    )
    guide: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Embedding model that finds false negatives for gist: a run, adapter or model.",
    )
    pooling: Pooling | None = Field(
        None,
        description="Pooling of token states; default: that of the model, else mean (encoder) or "
        "last (decoder).",
    )
    normalize: bool | None = Field(
        None, description="Whether embeddings have length 1; default: as in the model, else yes."
    )
    similarity: Similarity | None = Field(
        None, description="Similarity of two embeddings; default: that of the model, else cosine."
    )
    query_prompt: str | None = Field(
        None, description="Text before each query; default: that of the model."
    )
    document_prompt: str | None = Field(
        None, description="Text before each document; default: that of the model."
    )
    include_prompt: bool | None = Field(
        None,
        description="Whether the tokens of prompts are pooled too; default: as in the model, else"
        " yes.",
    )
    matryoshka_dims: Dims = Field(
        (),
        description="Embedding sizes to train, each the first dimensions of the full vector, e.g."
        " 384,256,128,64. The full size is among them only if listed; default: only the full size.",
    )
    matryoshka_weights: Annotated[
        tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_split_dims)
    ] = Field((), description="Weights of the losses of matryoshka_dims; default: 1 each.")
    batch_sampler: Literal["no_duplicates", "batch_sampler"] = Field(
        "no_duplicates",
        description="Sampling of the rows of a step; no_duplicates: no text occurs twice in a "
        "step.",
    )
    grad_cache: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether to embed the texts of a step twice (GradCache), so that memory holds "
        "the activations of one micro-batch only; auto: if the activations of all texts do not "
        "fit. Results are the same.",
    )

    def get_options(self, config: Any) -> dict[str, Any]:
        """Returns the settings of the embeddings and of the loss, with the teacher."""
        return {**self.model_dump(mode="json"), "teacher": config.distillation.teacher}

    def get_rate_factor(self, method: str, kind: str, size: float) -> tuple[float, str]:
        """Returns the factor on the default learning rate, which only decoders have."""
        if kind != "decoder":
            return 1.0, ""
        return DECODER_RATES.get(method, DECODER_RATE) ** (1 - size), "measured with SmolLM2"

    def validate_run(self, config: Any) -> Iterator[str]:
        """Yields an error message per invalid setting."""
        return validate_embedding(self, config.train.rows_per_step, config.distillation.teacher)


def validate_embedding(config: EmbeddingConfig, batch: int, teacher: str | None) -> Iterator[str]:
    """Yields an error message per invalid setting; `batch` is the number of rows per step."""
    yield from _validate_dims(config)
    loss = config.loss or DEFAULT_LOSSES["pairs"]
    # Without --loss, rows with classes are trained by contrastive, which has a margin.
    names = [name for name in config.changed if config.loss or name != "margin"]
    yield from list_unread("embedding", names, loss, PARAMETERS)
    if loss == "gist" and config.guide is None:
        reason, fix = "it finds false negatives", "Add --guide MODEL."
        yield needs("--loss gist", "--guide MODEL", reason, fix)
    if teacher is not None and not LOSSES[loss].needs_teacher:
        losses = join_names(name for name, facts in LOSSES.items() if facts.needs_teacher)
        yield has_no_effect("--teacher", f"--loss {loss}", f"it is for {losses}")
    if LOSSES[loss].contrasts and batch == 1:
        yield (
            f"--per-device-train-batch-size 1: --loss {loss} compares the rows of a step, and a "
            "step has one. Use at least 2, or more --gradient-accumulation-steps."
        )


def _validate_dims(config: EmbeddingConfig) -> Iterator[str]:
    dims, weights = config.matryoshka_dims, config.matryoshka_weights
    if len(set(dims)) < len(dims):
        text = ",".join(map(str, dims))
        yield f"--matryoshka-dims {text}: a dimension is listed twice. Drop one."
    elif weights and len(weights) != len(dims):
        yield (
            f"embedding.matryoshka_weights has {len(weights)} values for {len(dims)} "
            "--matryoshka-dims. Give one for each."
        )
