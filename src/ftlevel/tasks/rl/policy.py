"""Reinforcement learning from rewards: a decoder is trained on its own completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ftlevel.config import DataConfig
from ftlevel.config.section import Choice
from ftlevel.data.formats.detect import Format
from ftlevel.data.sources.table import Row, Table
from ftlevel.task import Checks
from ftlevel.tasks.base import BaseTask
from ftlevel.tasks.rl.formats import PROMPT_SHAPES, RlPromptEncoder
from ftlevel.tasks.text import TASKS as TEXT_TASKS
from ftlevel.tasks.text import TextTask

if TYPE_CHECKING:
    from ftlevel.data.encoding.fit import FittedRows
    from ftlevel.data.prepare.encoder import Encoder
    from ftlevel.data.prepare.loading import LoadedExamples


@dataclass(frozen=True)
class RlTask(TextTask):
    """Task of a decoder that learns from rewards of its own completions."""

    checks: ClassVar[Checks] = Checks(supervised=False)

    def find_format(
        self, columns: Sequence[str], config: DataConfig, rows: Sequence[Row] = ()
    ) -> Format:
        """Return the format of `columns`; all others are for the reward functions."""
        return replace(BaseTask.find_format(self, columns, config, rows), unused=())

    def read_columns(
        self, format_: Format, table: Table, config: DataConfig
    ) -> tuple[Format, list[Choice]]:
        """Return the format unchanged."""
        return format_, []

    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> FittedRows:
        """Return encoded prompts."""
        if encoder.prompt_format is None:
            raise TypeError("prompts have a format")
        encode = RlPromptEncoder(encoder.tokenizer, encoder.prompt_format)
        return encoder.fit(encoder.collect(encode, examples), table)

    def describe_rows(self, loaded: LoadedExamples, facts: Mapping[str, Any]) -> list[Choice]:
        """Return the number of prompt tokens."""
        return [Choice("tokens", f"{facts['tokens']:,} in prompts")]


_TEXT = next(task for task in TEXT_TASKS if task.name == "text-generation")
_SHARED = {f.name: getattr(_TEXT, f.name) for f in fields(TextTask)}

TASKS = (
    RlTask(
        **_SHARED
        | {
            "name": "rl",
            "shapes": PROMPT_SHAPES,
            "headline": "reward",
            "auto_classes": {"decoder": "AutoModelForCausalLM"},
            "peft_types": {"decoder": "CAUSAL_LM"},
            "refusals": {
                "encoder": "Use a decoder such as Llama.",
                "encoder-decoder": "Its source and its completions have no common sequence, which "
                "the groups of a step share. Use a decoder such as Llama.",
            },
        }
    ),
)
