"""The shape of a task: the model class and PEFT type by kind of model, and how it is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ftlevel.errors import ConfigError, listing


@dataclass(frozen=True)
class Task:
    """What ftlevel knows of a task.

    Attributes:
        name: as in `--task`.
        auto_classes: kind of model → transformers' auto class.
        peft_types: kind of model → PEFT's TaskType.
        instruction: what a decoder or T5 is told before the source text; empty for none.
        answer_cue: what ends the prompt of a model without a chat template.
        generates: whether generated text is scored by default.
        headline: the metric that is shown first, without prefix.
        labelled: whether the target is a class.
        refusals: kind of model → why the task cannot be had, and what to do.
    """

    name: str
    auto_classes: Mapping[str, str]
    peft_types: Mapping[str, str]
    headline: str
    instruction: str = ""
    answer_cue: str = ""
    generates: bool = False
    labelled: bool = False
    refusals: Mapping[str, str] = field(default_factory=dict)

    def auto_class(self, kind: str, model_type: str) -> str:
        """Return transformers' auto class for a model of `kind`.

        Raises:
            ConfigError: the task cannot be done by such a model.
        """
        if kind in self.auto_classes:
            return self.auto_classes[kind]
        wanted = listing(self.auto_classes)
        raise ConfigError(
            f"--task {self.name} cannot be used with {model_type}, which is an {kind}; it needs "
            f"an {wanted}. {self.refusals.get(kind, '')}".strip()
        )
