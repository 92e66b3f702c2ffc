"""Settings of embedding models and rerankers, and of `ftlevel mine`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from ftlevel.config.constraints import flag_name, list_violations
from ftlevel.config.evaluation import EvaluateConfig
from ftlevel.config.section import Positive, Section, TaskSection, list_unread, parse_range
from ftlevel.config.sections import (
    INPUT_FORMAT,
    ComputePrecision,
    IgnoredColumns,
    MovedBase,
    RunDevice,
    list_unused_fields,
)
from ftlevel.errors import excludes, has_no_effect, join_names, needs
from ftlevel.extensions import load

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


EMBEDDING_LOSSES: dict[str, EmbeddingLoss] = {
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
PARAMETERS = {name: facts.parameters for name, facts in EMBEDDING_LOSSES.items()}
"""Loss → settings that it reads."""
DEFAULT_LOSSES: dict[Columns, str] = {"pairs": "mnrl", "scores": "cosent"}
LOSS_ALIASES = {
    "infonce": "mnrl",
    "multiplenegativesranking": "mnrl",
    "gistembed": "gist",
    "cosinesimilarity": "cosine",
    "marginmse": "margin-mse",
    "distillkldiv": "kl",
    "binarycrossentropy": "bce",
    "listwise": "lce",
    "localizedcontrastive": "lce",
}
"""Other tools' loss, lower-case without dashes, "cached" and "loss" → ftlevel's name."""


def _normalize_loss(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    name = value.lower().replace("_", "-")
    key = name.replace("-", "").removeprefix("cached").removesuffix("loss")
    losses = (*EMBEDDING_LOSSES, *RERANKING_LOSSES)
    return name if name in losses else LOSS_ALIASES.get(key, key if key in losses else name)


_WITH_TEACHER = list_unused_fields(
    "embedding|reranking", "the model learns the scores of --teacher"
)


def _split_dims(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


Dims = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_split_dims)]


class RetrievalSection(TaskSection):
    """Base class of the settings of models that read texts; a teacher scores documents."""

    shorthand: ClassVar[str] = "loss"
    has_teacher: ClassVar[bool] = True

    def get_options(self, config: Any) -> dict[str, Any]:
        return {**self.model_dump(mode="json"), "teacher": config.distillation.teacher}

    def _check_teacher(self, config: Any, loss: str | None, learners: list[str]) -> Iterator[str]:
        yield from list_violations(config, _WITH_TEACHER)
        if config.distillation.teacher is not None and loss not in (None, *learners):
            yield has_no_effect("--teacher", f"--loss {loss}", f"it is for {join_names(learners)}")


class EmbeddingConfig(RetrievalSection):
    """Settings of embedding models: loss, pooling, prompts and sampling."""

    tasks: ClassVar[tuple[str, ...]] = ("embedding",)
    summary: ClassVar[str] = "Settings of an embedding model."
    uses: ClassVar[Mapping[str, tuple[str, ...]]] = {"embedding": ("data.qrels", "data.corpus")}
    overlong: ClassVar[tuple[str, ...]] = ("drop", "truncate")
    pipeline_tags: ClassVar[Mapping[str, str]] = {"embedding": "sentence-similarity"}
    paths: ClassVar[Mapping[str, str]] = {"guide": "--guide"}

    loss: Annotated[EmbeddingLossName, BeforeValidator(_normalize_loss)] | None = Field(
        None, description="Embedding loss; default: mnrl for pairs, cosent for scores."
    )
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

    def get_rate_factor(self, method: str, kind: str, size: float) -> tuple[float, str]:
        """Returns the factor on the default learning rate, which only decoders have."""
        if kind != "decoder":
            return 1.0, ""
        return DECODER_RATES.get(method, DECODER_RATE) ** (1 - size), "measured with SmolLM2"

    def validate_run(self, config: Any) -> Iterator[str]:
        loss = self.loss or DEFAULT_LOSSES["pairs"]
        learners = [name for name, facts in EMBEDDING_LOSSES.items() if facts.needs_teacher]
        yield from self._check_teacher(config, loss, learners)
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if len(set(dims)) < len(dims):
            text = ",".join(map(str, dims))
            yield f"--matryoshka-dims {text}: a dimension is listed twice. Drop one."
        elif weights and len(weights) != len(dims):
            yield (
                f"embedding.matryoshka_weights has {len(weights)} values for {len(dims)} "
                "--matryoshka-dims. Give one for each."
            )
        # Without --loss, rows with classes are trained by contrastive, which has a margin.
        names = [name for name in self.changed if self.loss or name != "margin"]
        yield from list_unread("embedding", names, loss, PARAMETERS)
        if loss == "gist" and self.guide is None:
            reason, fix = "it finds false negatives", "Add --guide MODEL."
            yield needs("--loss gist", "--guide MODEL", reason, fix)
        if EMBEDDING_LOSSES[loss].contrasts and config.train.rows_per_step == 1:
            yield (
                f"--per-device-train-batch-size 1: --loss {loss} compares the rows of a step, and "
                "a step has one. Use at least 2, or more --gradient-accumulation-steps."
            )


RerankingLossName = Literal["bce", "lce", "listnet", "ranknet", "lambda", "margin-mse", "mse"]


@dataclass(frozen=True)
class RerankingLoss:
    """Properties of a reranking loss.

    Attributes:
        is_listwise: whether a query needs several documents, not all with the same label.
        reads_teacher: whether the loss can use a teacher's scores instead of labels.
        is_bounded: whether labels have to be from 0 to 1.
        is_binary: whether a query needs a document with a label above 0, and one without.
    """

    is_listwise: bool = True
    needs_teacher: bool = False
    reads_teacher: bool = False
    is_bounded: bool = False
    is_binary: bool = False


RERANKING_LOSSES: dict[str, RerankingLoss] = {
    "bce": RerankingLoss(is_listwise=False, is_bounded=True),
    "lce": RerankingLoss(is_binary=True),
    "listnet": RerankingLoss(),
    "ranknet": RerankingLoss(),
    "lambda": RerankingLoss(),
    "margin-mse": RerankingLoss(needs_teacher=True, reads_teacher=True, is_binary=True),
    "mse": RerankingLoss(is_listwise=False, reads_teacher=True),
}


class RerankingConfig(RetrievalSection):
    """Settings of rerankers: the loss and its parameters."""

    tasks: ClassVar[tuple[str, ...]] = ("reranking",)
    summary: ClassVar[str] = "Ranking loss."
    overlong: ClassVar[tuple[str, ...]] = ("drop", "truncate", "truncate-prompt")
    pipeline_tags: ClassVar[Mapping[str, str]] = {"reranking": "text-ranking"}

    loss: Annotated[RerankingLossName, BeforeValidator(_normalize_loss)] | None = Field(
        None,
        description="Reranking loss; default: lce for several documents per query, bce for one; "
        "margin-mse and mse with a teacher.",
    )
    pos_weight: Annotated[float, Field(gt=0, le=10_000)] | None = Field(
        None,
        description="Weight of relevant documents in bce; default: number of irrelevant "
        "documents per relevant one.",
    )

    def validate_run(self, config: Any) -> Iterator[str]:
        learners = [name for name, facts in RERANKING_LOSSES.items() if facts.reads_teacher]
        return self._check_teacher(config, self.loss, learners)


_WITH_QRELS = """
    name qrels corpus task quant base against eval_tokens resamples seed batch_size base_model dtype
    device
""".split()


class RetrievalOptions(EvaluateConfig):
    """Options of `ftlevel evaluate` for embedding models."""

    qrels: Path | None = Field(
        None,
        description="Relevance judgments (.tsv) of a retrieval set in BEIR's layout, in place of "
        "--dataset. Queries and corpus are read from its directory.",
    )

    def list_conflicts(self) -> Iterator[str]:
        """Yields an error message per option for rows that is set with `qrels`."""
        yield from super().list_conflicts()
        names = [name for name in type(self).model_fields if name not in _WITH_QRELS]
        given = [name for name in names if getattr(self, name) not in (None, {}, ())]
        if self.qrels is not None and given:
            yield excludes(flag_name(given[0], type(self)), "--qrels")

    def open_data(self, ref: Any) -> Any:
        if self.qrels is None:
            return super().open_data(ref)
        return load("ftlevel.extras.retrieval.evaluators:RetrievalData")(self, ref)


def _parse_range(value: Any) -> Any:
    """Parse `10-210` as (10, 210), first and last rank; raise ValueError for other text."""
    bounds = parse_range(value) if isinstance(value, str) else value
    if bounds is None:
        raise ValueError(f"{value!r} is not a range of ranks, such as 10-210")
    return bounds


Ranks = Annotated[tuple[Positive, Positive], BeforeValidator(_parse_range)]


class MineConfig(Section):
    """Configuration of `ftlevel mine`, the search for hard negatives."""

    name: str = Field(
        min_length=1, description="Embedding model that searches: a run, adapter or model."
    )
    dataset: str = Field(min_length=1, description="Data file with queries and positives.")
    output: Path = Field(
        description="Output file (.jsonl or .parquet), with columns query, pos and neg."
    )
    corpus: Path | None = Field(
        None,
        description="File of further documents to search, with a column text; default: only the "
        "documents of the dataset.",
    )
    negatives: Positive = Field(5, description="Number of negatives per query.")
    relative_margin: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05,
        description="Minimum distance of negatives below the lowest-scored positive, as a share "
        "of that score. Documents with higher scores are skipped as probably relevant.",
    )
    ranks: Ranks | None = Field(
        None,
        description="Ranks to choose negatives from, not counting skipped documents; default: "
        "1-100.",
    )
    sampling: Literal["top", "random"] = Field(
        "top", description="Selection of negatives in the range: the first ones, or at random."
    )
    scores: bool = Field(
        False,
        description="Whether to add the model's scores as pos_scores and neg_scores, for "
        "distillation.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Column mapping, FTLEVEL_NAME=YOUR_COLUMN, e.g. positive=answer.",
        examples=[{"positive": "answer"}],
    )
    ignore_columns: IgnoredColumns = ()
    format: str | None = Field(None, description="Format of the rows, if several formats match.")
    input_format: str | None = Field(None, min_length=1, description=INPUT_FORMAT)
    overwrite: bool = Field(False, description="Whether to replace an existing output file.")
    base_model: MovedBase = None
    batch_size: Positive | None = Field(None, description="Batch size; default: by row length.")
    seed: int = Field(0, ge=0, description="Random seed of --sampling random.")
    dtype: ComputePrecision = "auto"
    device: RunDevice = "auto"

    @property
    def rank_range(self) -> tuple[int, int]:
        """First and last rank of matches to choose negatives from; the best match has rank 1."""
        return self.ranks or (1, 100)

    @model_validator(mode="after")
    def _validate_ranks(self) -> MineConfig:
        first, last = self.rank_range
        if last - first + 1 < self.negatives:
            raise ValueError(
                f"--ranks {first}-{last} has {max(last - first + 1, 0)} ranks, and --negatives is "
                f"{self.negatives}. Widen the range."
            )
        return self
