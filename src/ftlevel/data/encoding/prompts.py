"""One formatter for training, evaluation and generation: what a prompt is laid out as.

A model with a chat template is spoken to through it. One without sees the prompt, the cue of the
task, and the answer. What is used is written beside the adapter (`PromptFormat.to_dict`).

Tokenizers join a space with the word behind it (`▁word`, `Ġword`). So the space between a prompt
and its answer belongs to the answer: a prompt never ends in the token of a lone space, and the
tokens of a row are those of its text as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.data.encoding.chat import Turn, render
from ftlevel.data.formats.examples import PlainText
from ftlevel.errors import InputError

PROMPT_VERSION = 2
"""Version of plain prompts that new runs use.

1: the space behind the cue ends the prompt, and the answer is tokenized apart from it.
2: that space begins the answer, and both are tokenized as one text.
"""

_OF_PLAIN = ("separator", "version")
"""Fields that say nothing of other kinds, and are not written for them."""


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt is laid out.

    Attributes:
        kind: through the tokenizer's chat template, as plain text, or as an encoder's input.
        instruction: what comes before the source text; empty for none.
        answer_cue: what ends a plain prompt, such as `Summary:`.
        system: the first turn of what has no system turn of its own; empty for none.
        separator: text between a plain prompt without a cue and its answer.
        version: of plain prompts, see `PROMPT_VERSION`.
    """

    kind: Literal["chat-template", "plain", "seq2seq"]
    instruction: str = ""
    answer_cue: str = ""
    system: str = ""
    separator: str = ""
    version: int = PROMPT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, to be written beside the adapter."""
        unused = () if self.kind == "plain" else _OF_PLAIN
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in unused and (value or name != "system")
        }

    def with_system(self, turns: Sequence[Turn]) -> list[Turn]:
        """Return `turns` with the system turn that they lack, if there is one."""
        if not self.system or (turns and turns[0]["role"] == "system"):
            return list(turns)
        return [{"role": "system", "content": self.system}, *turns]

    def user_text(self, source: str) -> str:
        """Return what the user says: the instruction, an empty line, and the source text."""
        return f"{self.instruction}\n\n{source}" if self.instruction else source

    def plain_prompt(self, source: str, *, has_system: bool = False) -> str:
        """Return a prompt without a chat template, up to where generation begins.

        Args:
            source: what is asked.
            has_system: whether it begins with a system text of its own.
        """
        return self.plain_parts(source, "", has_system=has_system)[0]

    def plain_parts(self, source: str, target: str, *, has_system: bool = False) -> tuple[str, str]:
        """Return the prompt and the answer of a row, whose texts together are the row's.

        The last space of the prompt begins the answer, unless `target` begins with white space.
        """
        text = self.user_text(source)
        if self.system and not has_system:
            text = f"{self.system}\n\n{text}"
        if self.answer_cue:
            text = f"{text}\n\n{self.answer_cue} "
        elif not text[-1:].isspace():
            text += self.separator
        if self.version == 1 or not text.endswith(" "):
            return text, target
        return text[:-1], target if target[:1].isspace() else f" {target}"

    def for_rows(self, examples: Sequence[Any], version: int = PROMPT_VERSION) -> PromptFormat:
        """Return the format with the separator that `examples` need.

        It is a newline, or nothing where all answers begin with white space, as TRL has them, or
        all prompts end with it; version 1 has always a newline. Plain texts need none.

        Args:
            examples: of one kind.
            version: of the format, see `PROMPT_VERSION`.
        """
        if self.kind != "plain":
            return self
        joined = bool(self.answer_cue) or all(_joins(example, version) for example in examples)
        return replace(self, separator="" if joined else "\n", version=version)


def _joins(example: Any, version: int) -> bool:
    """Whether nothing need be put between the prompt and the answer of `example`."""
    if isinstance(example, PlainText) or version == 1:
        return isinstance(example, PlainText)
    parts = example.parts
    return bool(parts.asked[-1:].isspace() or parts.answered[:1].isspace())


def choose_format(tokenizer: Any, kind: str, instruction: str, answer_cue: str) -> PromptFormat:
    """Return the format for a model of `kind` with `tokenizer`."""
    if kind == "encoder-decoder":
        return PromptFormat("seq2seq", instruction)
    if getattr(tokenizer, "chat_template", None):
        return PromptFormat("chat-template", instruction)
    return PromptFormat("plain", instruction, answer_cue)


def read_format(card: AdapterCard) -> PromptFormat | None:
    """Return the format of the model that `card` describes; None where it takes no prompts.

    Raises:
        InputError: a later ftlevel wrote it.
    """
    if not card.prompt:
        return None
    known = {field.name for field in fields(PromptFormat)}
    if not card.prompt.keys() <= known or card.prompt.get("version", 1) not in (1, PROMPT_VERSION):
        raise InputError(
            f"its ftlevel.json has prompts as {dict(card.prompt)}, which a later ftlevel lays out. "
            "Install that version."
        )
    return PromptFormat(**card.prompt)


def prompt_ids(
    tokenizer: Any, prompt_format: PromptFormat, source: str, *, has_system: bool = False
) -> list[int]:
    """Return the token ids with which the model is asked, exactly as in training.

    Raises:
        InputError: the prompt has no tokens.
    """
    if prompt_format.kind == "seq2seq":
        return list(tokenizer(prompt_format.user_text(source))["input_ids"])
    if prompt_format.kind == "chat-template":
        turns = [{"role": "user", "content": prompt_format.user_text(source)}]
        return chat_prompt_ids(tokenizer, prompt_format.with_system(turns))
    text = prompt_format.plain_prompt(source, has_system=has_system)
    ids = without_end(tokenizer(text)["input_ids"], tokenizer)
    if not ids:
        raise InputError("the prompt is empty, and the tokenizer has no token to begin with")
    return ids


def chat_prompt_ids(
    tokenizer: Any, turns: Sequence[Turn], tools: Sequence[dict[str, Any]] = ()
) -> list[int]:
    """Return the token ids of `turns` up to where the answer begins.

    In training rows a space at that place is part of the answer's first token.

    Raises:
        InputError: the template refuses the turns.
    """
    text = render(tokenizer, turns, tools, generation_prompt=True).removesuffix(" ")
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def without_end(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Return `ids` with one BOS at most, and without the EOS token at the end."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = 1 if bos is not None and list(ids[:2]) == [bos, bos] else 0
    end = len(ids) - (eos is not None and list(ids[-1:]) == [eos])
    return list(ids[start:end])
