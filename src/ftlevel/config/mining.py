"""Configuration of `ftlevel mine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ftlevel.config.section import Positive, Section, parse_range
from ftlevel.config.sections import (
    INPUT_FORMAT,
    ComputePrecision,
    IgnoredColumns,
    MovedBase,
    RunDevice,
)


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
