"""Reinforcement learning from rewards: a decoder is trained on its own completions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftlevel.config import DataConfig
from ftlevel.config.rl import RewardSpec, RlConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.data.formats.detect import Format
from ftlevel.data.sources.table import Row, Table
from ftlevel.objectives import Checks, Objective
from ftlevel.tasks.base import BaseTask
from ftlevel.tasks.rl.objective import PolicyGradient
from ftlevel.tasks.rl.rows import PROMPT_SHAPES, PromptRow, RlPromptEncoder
from ftlevel.tasks.text import TASKS as TEXT_TASKS
from ftlevel.tasks.text import TextTask

if TYPE_CHECKING:
    from ftlevel.data.encoding.fit import FittedRows
    from ftlevel.data.prepare.encoder import Encoder
    from ftlevel.data.prepare.loading import LoadedExamples
    from ftlevel.models.sources import ModelSource


@dataclass(frozen=True)
class RlTask(TextTask):
    """Task of a decoder that learns from rewards of its own completions."""

    settings: RlConfig = field(default_factory=RlConfig)
    teacher: str | None = None

    checks: ClassVar[Checks] = Checks(supervised=False)
    uses_dropout: ClassVar[bool] = False

    def configured(self, options: Mapping[str, Any]) -> RlTask:
        """Returns the task with the settings of a configuration or model card."""
        settings = RlConfig(**options.get("rl", {}))
        return replace(self, settings=settings, teacher=options.get("teacher"))

    @property
    def encoding_options(self) -> Mapping[str, Any]:
        """Options that change the encoded rows and are not in the config's data section."""
        return {"most": self.settings.max_completion_length}

    def build_objective(self, kind: str, facts: Mapping[str, Any]) -> Objective:
        """Build the policy objective."""
        return PolicyGradient(
            self.headline,
            temperature=self.settings.temperature,
            settings=self.settings,
            teacher=self.teacher,
        )

    def card_defaults(
        self, source: ModelSource, model_config: Any, tokenizer: Any, kind: str
    ) -> dict[str, Any]:
        """Returns the default prompt format of `train`, and RL settings without a reward."""
        return {
            **super().card_defaults(source, model_config, tokenizer, kind),
            "options": {"rl": {}},
        }

    def card_options(self, config: DataConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings by which an evaluation samples and scores held-out prompts."""
        places = [_absolute(spec) for spec in self.settings.rewards]
        options = {"rl": {**self.settings.model_dump(mode="json"), "reward": places}}
        if self.teacher is None:
            return options
        path = Path(self.teacher).expanduser()
        return {**options, "teacher": str(path.absolute()) if path.exists() else self.teacher}

    def synthetic_row(self, ids: list[int], row: int) -> Encoded:
        """Returns a synthetic prompt that leaves room for a completion."""
        room = max(1, len(ids) - self.settings.max_completion_length)
        text = json.dumps({"prompt": "", "columns": {}})
        return PromptRow(ids[:room], [IGNORED] * room, row, {}, text, len(ids) - room)

    def find_format(
        self, columns: Sequence[str], config: DataConfig, rows: Sequence[Row] = ()
    ) -> Format:
        """Find the format of `columns`; the reward functions may use all other columns."""
        return replace(BaseTask.find_format(self, columns, config, rows), unused=())

    def read_columns(
        self, format_: Format, table: Table, config: DataConfig
    ) -> tuple[Format, list[Choice]]:
        """Returns the format unchanged."""
        return format_, []

    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> FittedRows:
        """Encode prompts without targets; completions are sampled in training."""
        if encoder.prompt_format is None:
            raise TypeError("prompts have a format")
        most = self.settings.max_completion_length
        encode = RlPromptEncoder(encoder.tokenizer, encoder.prompt_format, most)
        return encoder.fit(encoder.collect(encode, examples), table)

    def describe_rows(self, loaded: LoadedExamples, facts: Mapping[str, Any]) -> list[Choice]:
        """Returns a line with the number of prompt tokens."""
        settings = self.settings
        low, high = settings.clip
        clip = f"ratio at most {high:g}" if low is None else f"clip -{low:g} +{high:g}"
        if self.teacher:
            parts = [f"reverse KL from {self.teacher}", clip]
        else:
            parts = [clip, f"advantages over {settings.scale} deviation"]
        parts += [f"beta {settings.beta:g}"] if settings.beta else []
        sampled = (
            f"{settings.num_generations} completions of at most "
            f"{settings.max_completion_length:,} tokens a prompt"
        )
        return [
            Choice("tokens", f"{facts['tokens']:,} in prompts"),
            Choice("loss", settings.loss, ", ".join(parts)),
            Choice("rollouts", sampled, f"temperature {settings.temperature:g}"),
        ]


def _absolute(spec: RewardSpec) -> str:
    """Returns a reward as the user wrote it, but with the absolute path of its file."""
    if spec.kind != "function":
        return spec.text
    return f"{Path(spec.name).resolve()}:{spec.argument}={spec.weight:g}"


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
