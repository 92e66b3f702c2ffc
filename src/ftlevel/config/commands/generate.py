"""What `ftlevel generate` is told: who answers, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from ftlevel.config.options.decoding import Decoding
from ftlevel.config.options.pairs import FewNames
from ftlevel.config.sections import IGNORE_COLUMNS, Positive
from ftlevel.config.tasks import TaskName


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
