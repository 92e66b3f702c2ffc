"""Configuration of `ftlevel evaluate`, `ftlevel generate` and `ftlevel predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, create_model, field_validator

from ftlevel.config.constraints import Constraints, Excludes, Needs
from ftlevel.config.output import Decoding, DecodingAsInTraining
from ftlevel.config.reading import normalize_task
from ftlevel.config.section import FewNames
from ftlevel.config.sections import (
    INPUT_FORMAT,
    ColumnMap,
    ComputePrecision,
    DatasetName,
    IgnoredColumns,
    MovedBase,
    Positive,
    RunDevice,
)
from ftlevel.config.tasks import TaskName
from ftlevel.extensions import load_all

UnnamedTask = Annotated[
    TaskName | None,
    BeforeValidator(lambda name: normalize_task(name) if isinstance(name, str) else name),
    Field(description="Task of a model or plain PEFT adapter whose files do not name it."),
]


UnnamedLabels = Annotated[
    FewNames,
    Field(description="Comma-separated class names, in order, of a model whose files have none."),
]


class EvaluateConfig(DecodingAsInTraining):
    """Configuration of `ftlevel evaluate`; by default, model and data are as in training."""

    constraints: ClassVar[Constraints] = (
        Needs("eval_text", "against MODEL", "it is for comparing two models"),
        Needs("subset", "dataset FILE"),
        Needs("input_format", "dataset FILE"),
    )
    name: str = Field(min_length=1, description="Run directory, adapter or model to evaluate.")
    dataset: DatasetName | None = Field(
        None,
        description="Data to evaluate on; default: the run's own data. A file, directory, glob "
        "pattern, Hub id, or - for stdin.",
    )
    corpus: Path | None = Field(
        None,
        description="Documents to search: .jsonl or another table with a column text. Default: "
        "those of the rows, or corpus.jsonl beside --qrels.",
    )
    input_format: str | None = Field(None, min_length=1, description=INPUT_FORMAT)
    subset: str | None = Field(
        None, description="Configuration (subset) of a Hub dataset, or sheet of a workbook."
    )
    split: Literal["train", "validation", "test"] | None = Field(
        None, description="Split to evaluate; default: validation, or all rows of a single file."
    )
    on_bad_row: Literal["error", "skip"] | None = Field(
        None, description="Action for invalid rows; default: as in training."
    )
    columns: ColumnMap = Field(default_factory=dict)
    ignore_columns: IgnoredColumns = ()
    task: UnnamedTask = None
    labels: UnnamedLabels = ()
    quant: Literal["none", "4bit", "8bit"] | None = Field(
        None, description="Quantization of the base model, if different from training."
    )
    base: bool = Field(
        True, description="Whether to also evaluate the base model, with the adapter disabled."
    )
    against: str | None = Field(
        None,
        min_length=1,
        description="Run, adapter or model to compare with, by KL divergence and top-1 agreement."
        " Both are measured on the same rows and on general text.",
    )
    eval_text: Path | None = Field(
        None, description="Text file for --against; default: Python library documentation."
    )
    eval_tokens: Positive = Field(1024, description="Number of tokens of --eval-text to use.")
    max_eval_samples: Positive | None = Field(
        None, description="Maximum number of rows to evaluate; the first N are used."
    )
    batch_size: Positive | None = Field(None, description="Batch size; default: as in training.")
    max_generate_samples: Positive | None = Field(
        None,
        description="Number of rows to generate text for, for ROUGE or BLEU; default: as in "
        "training.",
    )
    metrics: FewNames = Field(
        (), description="Comma-separated metrics besides the loss; default: as in training."
    )
    resamples: int = Field(
        1000, ge=0, description="Number of bootstrap resamples for 95 % intervals; 0 disables them."
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="Random seed for bootstrap resampling and token sampling; without it, "
        "tokens are sampled as in training.",
    )
    predictions: Path | None = Field(
        None,
        description="Output file, one row per example: .jsonl, .csv, .tsv or .parquet, or .conll "
        "for tagged words. It must not exist.",
    )
    base_model: MovedBase = None
    dtype: ComputePrecision = "auto"
    device: RunDevice = "auto"

    @property
    def added_options(self) -> dict[str, Any]:
        """Options that extensions added, by name."""
        names = type(self).model_fields.keys() - _CORE_FIELDS
        return {name: getattr(self, name) for name in names}

    def open_data(self, ref: Any) -> Any:  # noqa: ARG002 - for extensions
        """Returns other data than rows, with the methods that `evaluate` calls; or None."""
        return None

    def check_task(self, task: str) -> None:
        """Raise ConfigError if an option that an extension adds is not for a model of `task`."""


_CORE_FIELDS = frozenset(EvaluateConfig.model_fields)

if not TYPE_CHECKING and (_options := load_all("evaluate_options")):
    EvaluateConfig = create_model(
        "EvaluateConfig",
        __base__=tuple(_options),
        __module__=__name__,
        __doc__=EvaluateConfig.__doc__,
    )


class GenerateConfig(Decoding):
    """Configuration of `ftlevel generate`, except for the prompts."""

    name: str | None = Field(None, description="Run directory, adapter or model.")
    adapters: dict[str, Path] = Field(
        default_factory=dict,
        description="Additional adapters of the same base model: name → directory.",
    )
    adapters_dir: Path | None = Field(
        None, description="Directory of adapters of one base model, each named by its folder."
    )
    chosen: list[str] = Field(
        default_factory=list, description="Names of the adapters that generate; default: all."
    )
    task: UnnamedTask = None
    columns: ColumnMap = Field(default_factory=dict)
    ignore_columns: IgnoredColumns = ()
    context: str | None = Field(
        None, description="Context that contains the answer (question answering)."
    )
    compare_base: bool = Field(False, description="Whether to also show the base model's output.")
    against: str | None = Field(
        None, min_length=1, description="Run, adapter or model that also answers each prompt."
    )
    max_new_tokens: Positive = Field(128, description="Maximum number of generated tokens.")
    seed: int = Field(0, ge=0, lt=2**32, description="Random seed for sampling.")
    batch_size: Positive = Field(8, description="Number of prompts per forward pass.")
    base_model: MovedBase = None
    dtype: ComputePrecision = "auto"
    device: RunDevice = "auto"


class PredictConfig(DecodingAsInTraining):
    """Configuration of `ftlevel predict`."""

    constraints: ClassVar[Constraints] = (
        Excludes("resume", "overwrite", "one continues and the other starts again"),
        Needs("resume", "output FILE"),
        Needs("overwrite", "output FILE"),
    )
    name: str = Field(min_length=1, description="Run directory, adapter or model.")
    dataset: str | None = Field(
        None,
        min_length=1,
        description="Data file, glob pattern, or - for stdin. CSV, TSV, JSONL, JSON, Parquet, "
        "Arrow, xlsx, CoNLL or text, optionally compressed (.gz, .bz2, .xz, .zst).",
    )
    output: Path | None = Field(
        None,
        description="Output file (.csv, .tsv, .jsonl or .parquet, .npy for embeddings, .conll for "
        "tags); default: - (JSONL on stdout).",
    )
    column: str = Field("prediction", min_length=1, description="Name of the prediction column.")
    columns: ColumnMap = Field(default_factory=dict)
    ignore_columns: IgnoredColumns = ()
    format: str | None = Field(None, description="Format of the rows, if several formats match.")
    input_format: str | None = Field(None, min_length=1, description=INPUT_FORMAT)
    subset: str | None = Field(None, description="Sheet of a workbook; default: the first.")
    probabilities: bool = Field(
        False, description="Whether to add the probability of each prediction."
    )
    top_k: Positive | None = Field(None, description="Number of most likely predictions to add.")
    normalize: bool | None = Field(
        None, description="Whether embeddings have length 1; default: as in the model."
    )
    dims: Positive | None = Field(
        None,
        description="Number of leading dimensions of embeddings to keep, as trained by "
        "--matryoshka-dims; default: as in the model.",
    )
    limit: Positive | None = Field(
        None, description="Maximum number of rows to predict; the first N are used."
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error",
        description="Action for rows that cannot be predicted: error, or skip (left empty).",
    )
    overlong: Literal["error", "truncate", "truncate-prompt"] | None = Field(
        None,
        description="Action for rows that are too long; default: as in training. error treats "
        "the row as a bad row; truncate and truncate-prompt shorten the text or prompt.",
    )
    resume: bool = Field(
        False, description="Whether to resume after the last complete row of --output."
    )
    overwrite: bool = Field(False, description="Whether to replace an existing --output file.")
    task: UnnamedTask = None
    labels: UnnamedLabels = ()
    batch_size: Positive | None = Field(None, description="Batch size; default: by row length.")
    base_model: MovedBase = None
    dtype: ComputePrecision = "auto"
    device: RunDevice = "auto"

    @field_validator("output", mode="before")
    @classmethod
    def _parse_stdout(cls, value: object) -> object:
        return None if str(value) == "-" else value
