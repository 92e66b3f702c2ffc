"""What `ftlevel evaluate` is told: what is scored, on which rows, and how the result is given.

What `ftlevel generate` is told: who answers, and how.

What `ftlevel predict` is told: who answers, which rows, and where the answers go.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ftlevel.config.in_memory import DatasetName
from ftlevel.config.output import Decoding, DecodingAsInTraining
from ftlevel.config.preference import FewNames
from ftlevel.config.sections import IGNORE_COLUMNS, INPUT_FORMAT, Positive
from ftlevel.config.tasks import TaskName


class EvaluateConfig(DecodingAsInTraining):
    """Everything that decides an evaluation. What is not given is as in training."""

    name: str = Field(min_length=1, description="A run, an adapter, or a model.")
    dataset: DatasetName | None = Field(
        None,
        description="File, directory, pattern of files, Hub id or - for stdin; the default is the "
        "run's own data.",
    )
    input_format: str | None = Field(None, min_length=1, description=INPUT_FORMAT)
    subset: str | None = Field(
        None, description="Configuration (subset) of a Hub data set, or sheet of a workbook."
    )
    split: Literal["train", "validation", "test"] | None = Field(
        None, description="Rows to score; the default is validation, or all rows of a single file."
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="What ftlevel calls a column: what the data calls it."
    )
    ignore_columns: FewNames = Field((), description=IGNORE_COLUMNS)
    task: TaskName | None = Field(
        None, description="Task of a model or a plain PEFT adapter whose files do not name it."
    )
    quant: Literal["none", "4bit", "8bit"] | None = Field(
        None, description="Quantize the base otherwise than in training: none, 4bit or 8bit."
    )
    base: bool = Field(True, description="Score the base beside it, with the adapter switched off.")
    against: str | None = Field(
        None,
        min_length=1,
        description="Another run, adapter or model: how far from it the scored one is (KL, same "
        "first choice), on the same rows and on general text.",
    )
    eval_text: Path | None = Field(
        None,
        description="Text of --against; the default is documentation of Python's library.",
    )
    eval_tokens: Positive = Field(1024, description="How many tokens of it are read.")
    max_eval_samples: Positive | None = Field(None, description="Use only the first N rows.")
    batch_size: Positive | None = Field(
        None, description="Rows a forward pass; the default is as in training."
    )
    max_generate_samples: Positive | None = Field(
        None, description="How many rows are generated for ROUGE or BLEU; default as in training."
    )
    max_new_tokens: Positive | None = Field(
        None, description="Longest generated text in tokens; default as in training."
    )
    metrics: FewNames = Field(
        (),
        description="Metrics to give beside the loss, with commas between; default as in training.",
    )
    resamples: int = Field(
        1000, ge=0, description="Bootstrap draws of the rows for the 95 % intervals; 0 for none."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the draws of rows, and of tokens.")
    predictions: Path | None = Field(
        None,
        description="File to write a row an example to: .jsonl, .csv, .tsv or .parquet; must not "
        "exist.",
    )
    base_model: str | None = Field(
        None,
        min_length=1,
        description="Where an adapter's base model is now, if it has moved; its weights must be "
        "the same.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision to compute in; auto is that of training."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where to run.")

    @model_validator(mode="after")
    def _text_is_for_comparing(self) -> EvaluateConfig:
        if self.eval_text is not None and self.against is None:
            raise ValueError(
                f"--eval-text {self.eval_text} is what two models are compared on, and there is no "
                "--against. Name the other model, or give the rows to score with --dataset."
            )
        return self


class GenerateConfig(Decoding):
    """Everything that decides what is answered, beside the prompts."""

    name: str | None = Field(None, description="A run, an adapter, or a model.")
    adapters: dict[str, Path] = Field(
        default_factory=dict, description="Further adapters of the same base: name → directory."
    )
    adapters_dir: Path | None = Field(
        None, description="Directory of adapters of one base; each is called by its folder."
    )
    chosen: list[str] = Field(
        default_factory=list, description="Names of the adapters that answer; default all."
    )
    task: TaskName | None = Field(
        None, description="Task of a model or a plain PEFT adapter whose files do not name it."
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="What ftlevel calls a column: what the data calls it."
    )
    ignore_columns: FewNames = Field((), description=IGNORE_COLUMNS)
    context: str | None = Field(
        None, description="The text in which a question's answer is looked for."
    )
    compare_base: bool = Field(False, description="Show the base model's answer beside it.")
    max_new_tokens: Positive = Field(128, description="Longest answer in tokens.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of sampling.")
    batch_size: Positive = Field(8, description="Prompts a forward pass.")
    base_model: str | None = Field(
        None,
        min_length=1,
        description="Where an adapter's base model is now, if it has moved; its weights must be "
        "the same.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision to compute in; auto is that of training."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where to run.")


class PredictConfig(DecodingAsInTraining):
    """Everything that decides the answers to rows."""

    name: str = Field(min_length=1, description="A run, an adapter, or a model.")
    dataset: str | None = Field(
        None,
        min_length=1,
        description="File of rows: CSV, TSV, JSONL, JSON, Parquet, Arrow, xlsx, CoNLL or text, "
        "also compressed (.gz, .bz2, .xz, .zst); a pattern of files; - is stdin.",
    )
    output: Path | None = Field(
        None,
        description="File to write the rows with their answers to: .csv, .tsv, .jsonl or "
        ".parquet; without it, JSONL on stdout.",
    )
    column: str = Field("prediction", min_length=1, description="Name of the answer's column.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="What ftlevel calls a column: what the data calls it."
    )
    ignore_columns: FewNames = Field((), description=IGNORE_COLUMNS)
    format: str | None = Field(None, description="Format of the rows, where several fit.")
    input_format: str | None = Field(None, min_length=1, description=INPUT_FORMAT)
    subset: str | None = Field(None, description="Sheet of a workbook; the default is the first.")
    probabilities: bool = Field(False, description="Add how likely each answer is.")
    top_k: Positive | None = Field(None, description="Add the K likeliest answers.")
    limit: Positive | None = Field(None, description="Answer only the first N rows.")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="A row that cannot be answered: error, or skip, which leaves its "
        "answer empty.",
    )  # fmt: skip
    overlong: Literal["error", "truncate-prompt"] | None = Field(
        None,
        description="A row beyond the model's positions: error (a bad row), or truncate-prompt; "
        "the default is as in training.",
    )
    resume: bool = Field(False, description="Go on after the last whole row of --output.")
    overwrite: bool = Field(False, description="Replace an --output that exists.")
    task: TaskName | None = Field(
        None, description="Task of a model or a plain PEFT adapter whose files do not name it."
    )
    batch_size: Positive | None = Field(
        None, description="Rows a forward pass; the default is by their tokens."
    )
    max_new_tokens: Positive | None = Field(
        None, description="Longest generated text in tokens; default as in training."
    )
    base_model: str | None = Field(
        None,
        min_length=1,
        description="Where an adapter's base model is now, if it has moved; its weights must be "
        "the same.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision to compute in; auto is that of training."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where to run.")

    @model_validator(mode="after")
    def _one_way_with_what_is_there(self) -> PredictConfig:
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on and --overwrite begins anew. Give one of them.")
        for flag, wish in (("--resume", self.resume), ("--overwrite", self.overwrite)):
            if wish and self.output is None:
                raise ValueError(f"{flag} is for a file, and there is no --output. Name one.")
        return self
