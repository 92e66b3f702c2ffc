"""One formatter for training, evaluation and generation: what a prompt is laid out as.

A model with a chat template is spoken to through it. One without sees the prompt, the cue of the
task, and the answer. What is used is written beside the adapter (`PromptFormat.to_dict`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ftlevel.data.encoding.chat import Turn, render


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt is laid out.

    Attributes:
        kind: through the tokenizer's chat template, as plain text, or as an encoder's input.
        instruction: what comes before the source text; empty for none.
        answer_cue: what ends a plain prompt, such as `Summary:`.
        system: the first turn of what has no system turn of its own; empty for none.
    """

    kind: Literal["chat-template", "plain", "seq2seq"]
    instruction: str = ""
    answer_cue: str = ""
    system: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the fields, to be written beside the adapter."""
        return {name: text for name, text in asdict(self).items() if text or name != "system"}

    def with_system(self, turns: Sequence[Turn]) -> list[Turn]:
        """Return `turns` with the system turn that they lack, if there is one."""
        if not self.system or (turns and turns[0]["role"] == "system"):
            return list(turns)
        return [{"role": "system", "content": self.system}, *turns]

    def user_text(self, source: str) -> str:
        """Return what the user says: the instruction, an empty line, and the source text."""
        return f"{self.instruction}\n\n{source}" if self.instruction else source

    def plain_prompt(self, source: str, *, has_system: bool = False) -> str:
        """Return a prompt without a chat template; the answer follows it directly.

        Args:
            source: what is asked.
            has_system: whether it begins with a system text of its own.
        """
        text = self.user_text(source)
        if self.system and not has_system:
            text = f"{self.system}\n\n{text}"
        if self.answer_cue:
            return f"{text}\n\n{self.answer_cue} "
        return text if text[-1:].isspace() else text + "\n"


def choose_format(tokenizer: Any, kind: str, instruction: str, answer_cue: str) -> PromptFormat:
    """Return the format for a model of `kind` with `tokenizer`."""
    if kind == "encoder-decoder":
        return PromptFormat("seq2seq", instruction)
    if getattr(tokenizer, "chat_template", None):
        return PromptFormat("chat-template", instruction)
    return PromptFormat("plain", instruction, answer_cue)


def prompt_ids(
    tokenizer: Any, prompt_format: PromptFormat, source: str, *, has_system: bool = False
) -> list[int]:
    """Return the token ids with which the model is asked, exactly as in training."""
    if prompt_format.kind == "seq2seq":
        return list(tokenizer(prompt_format.user_text(source))["input_ids"])
    if prompt_format.kind == "chat-template":
        messages = [{"role": "user", "content": prompt_format.user_text(source)}]
        turns = prompt_format.with_system(messages)
        text = render(tokenizer, turns, generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    text = prompt_format.plain_prompt(source, has_system=has_system)
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
