"""What `ftlevel predict` is told: who answers, which rows, and where the answers go."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ftlevel.config.options.decoding import DecodingAsInTraining
from ftlevel.config.options.pairs import FewNames
from ftlevel.config.sections import IGNORE_COLUMNS, INPUT_FORMAT, Positive
from ftlevel.config.tasks import TaskName


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
