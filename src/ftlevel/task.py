"""The shape of a task: the model class and PEFT type by kind of model, and how it is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ftlevel.errors import ConfigError, listing

Target = Literal["text", "class", "tags", "span", "mask"]
"""What is predicted: text after or from a text, a class or a number of a text, a tag for each
word, a span of a text, or the tokens that were masked."""

ScoreTexts = Callable[[Sequence[str], Sequence[str], str], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """What ftlevel knows of a task.

    Attributes:
        name: as in `--task`.
        target: what is predicted.
        auto_classes: kind of model → transformers' auto class.
        peft_types: kind of model → PEFT's TaskType; a kind without one is a plain `PeftModel`.
        headline: the metric that is shown first, without prefix.
        instruction: what a decoder or T5 is told before the source text; empty for none.
        answer_cue: what ends the prompt of a model without a chat template.
        generates: whether generated text is scored by default.
        score_texts: scores generated texts against references in a language ("" if unknown).
        refusals: kind of model → why the task cannot be had, and what to do.
    """

    name: str
    target: Target
    auto_classes: Mapping[str, str]
    peft_types: Mapping[str, str]
    headline: str
    instruction: str = ""
    answer_cue: str = ""
    generates: bool = False
    score_texts: ScoreTexts | None = None
    refusals: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_new_head(self) -> bool:
        """Whether the head is new on a pretrained model, and so trained and saved in full."""
        return self.target in ("class", "tags", "span")

    def auto_class(self, kind: str, model_type: str) -> str:
        """Return transformers' auto class for a model of `kind`.

        Raises:
            ConfigError: the task cannot be done by such a model.
        """
        if kind in self.auto_classes:
            return self.auto_classes[kind]
        wanted = listing(self.auto_classes)
        raise ConfigError(
            f"--task {self.name} cannot be used with {model_type}, which is {_article(kind)}; it "
            f"needs {_article(wanted)}. {self.refusals.get(kind, '')}".strip()
        )


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
