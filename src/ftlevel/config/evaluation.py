"""What `ftlevel evaluate` is told: what is scored, on which rows, and how the result is given."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ftlevel.config.in_memory import DatasetName
from ftlevel.config.options.decoding import DecodingAsInTraining
from ftlevel.config.options.pairs import FewNames
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
