"""Reinforcement learning from rewards: a decoder is trained on its own completions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftlevel.config import DataConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.data.formats.detect import Format
from ftlevel.data.sources.table import Row, Table
from ftlevel.errors import InputError
from ftlevel.extras.rl.config import RlConfig
from ftlevel.extras.rl.objective import PolicyGradient
from ftlevel.extras.rl.rows import PROMPT_SHAPES, PromptRow, RlPromptEncoder
from ftlevel.objectives import Checks, Objective
from ftlevel.tasks.base import BaseTask
from ftlevel.tasks.text import TEXT_FIELDS, TextTask

if TYPE_CHECKING:
    from ftlevel.data.encoding.fit import FittedRows
    from ftlevel.data.prepare.encoder import Encoder
    from ftlevel.data.prepare.loading import LoadedData
    from ftlevel.models.sources import ModelSource


@dataclass(frozen=True)
class RlTask(TextTask):
    """Task of a decoder that learns from rewards of its own completions."""

    config: RlConfig = field(default_factory=RlConfig)
    teacher: str | None = None

    checks: ClassVar[Checks] = Checks(supervised=False)
    hooks: ClassVar[str] = "ftlevel.extras.rl.hooks:RlHooks"
    trains_language_head: ClassVar[bool] = True
    uses_dropout: ClassVar[bool] = False

    def configured(self, task_config: Mapping[str, Any]) -> RlTask:
        config = RlConfig(**task_config.get("rl", {}))
        return replace(self, config=config, teacher=task_config.get("teacher"))

    @property
    def stop_texts(self) -> Sequence[str]:
        return self.config.stop

    @property
    def encoding_config(self) -> Mapping[str, Any]:
        return {"most": self.config.max_completion_length}

    def create_objective(self, kind: str, data_info: Mapping[str, Any]) -> Objective:
        return PolicyGradient(
            self.headline,
            temperature=self.config.temperature,
            config=self.config,
            teacher=self.teacher,
        )

    def card_defaults(
        self, source: ModelSource, model_config: Any, tokenizer: Any, kind: str
    ) -> dict[str, Any]:
        return {
            **super().card_defaults(source, model_config, tokenizer, kind),
            "options": {"rl": {}},
        }

    def inference_config(self, config: DataConfig, data_info: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings by which an evaluation samples and scores held-out prompts."""
        specs = [spec.map_path(_absolute) for spec in self.config.rewards]
        values = {"rl": {**self.config.model_dump(mode="json"), "reward": specs}}
        return values if self.teacher is None else {**values, "teacher": _absolute(self.teacher)}

    def synthetic_row(self, ids: list[int], row: int) -> Encoded:
        """Returns a prompt of the first tokens of `ids`, to be completed to the length of `ids`."""
        room = max(1, len(ids) - self.config.max_completion_length)
        text = json.dumps({"prompt": "", "columns": {}})
        return PromptRow(ids[:room], [IGNORED] * room, row, {}, text, len(ids) - room)

    def get_format(
        self, column_names: Sequence[str], config: DataConfig, rows: Sequence[Row] = ()
    ) -> Format:
        """Returns the format; all columns count as used, because reward functions may use any."""
        return replace(BaseTask.get_format(self, column_names, config, rows), unused=())

    def update_format(
        self, format_: Format, table: Table, config: DataConfig
    ) -> tuple[Format, list[Choice]]:
        return format_, []

    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> FittedRows:
        """Encode prompts without targets; completions are sampled in training."""
        if encoder.prompt_format is None:
            raise TypeError("prompts have a format")
        most, positions = self.config.max_completion_length, encoder.bounds.positions
        if positions is not None and most >= positions:
            raise InputError(
                f"--max-completion-length {most:,} leaves no room for a prompt: the model has "
                f"{positions:,} positions. Use fewer tokens."
            )
        encode = RlPromptEncoder(encoder.tokenizer, encoder.prompt_format, most)
        return encoder.fit(encoder.collect(encode, examples), table)

    def describe_rows(self, loaded: LoadedData, data_info: Mapping[str, Any]) -> list[Choice]:
        config = self.config
        low, high = config.clip
        clip = f"ratio at most {high:g}" if low is None else f"clip -{low:g} +{high:g}"
        if self.teacher:
            parts = [f"reverse KL from {self.teacher}", clip]
        else:
            scale = f"divided by the {config.scale}'s standard deviation"
            parts = [clip, f"advantages {'not scaled' if config.scale == 'none' else scale}"]
        parts += [f"beta {config.beta:g}"] if config.beta else []
        weights = [
            f"{name} (weight {spec.weight:g})" if spec.weight != 1 else name
            for name, spec in zip(config.reward_names, config.rewards, strict=True)
        ]
        sampled = (
            f"{config.num_generations} completions of at most "
            f"{config.max_completion_length:,} tokens a prompt"
        )
        return [
            Choice("tokens", f"{data_info['tokens']:,} in prompts"),
            *([Choice("reward", ", ".join(weights))] if weights else []),
            Choice("loss", config.loss, ", ".join(parts)),
            Choice("rollouts", sampled, f"temperature {config.temperature:g}"),
        ]


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    is_file = path.exists() or path.suffix in (".py", ".json")  # else a model of the Hub
    return str(path.absolute()) if is_file else name


TASKS = (
    RlTask(
        **TEXT_FIELDS
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
