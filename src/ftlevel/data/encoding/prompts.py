"""Prompts: the format that training, evaluation and generation share, and the tokens of a prompt.

Tokenizers merge a space with the following word (`▁word`, `Ġword`), so the space between prompt and
answer belongs to the answer.
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
"""Version of plain prompts: the answer begins with the space after the cue, and both are tokenized
as one text."""


_OF_PLAIN = ("separator", "version")
"""Fields that apply to plain prompts only."""


@dataclass(frozen=True)
class PromptFormat:
    """Format of the prompts of a run, which is saved with the adapter.

    Attributes:
        kind: "chat-template", "plain", or "seq2seq" for an encoder-decoder.
        answer_cue: end of a plain prompt, such as `Summary:`.
        system: system prompt for conversations without one.
        separator: text between prompt and answer in plain text, if there is no cue.
    """

    kind: Literal["chat-template", "plain", "seq2seq"]
    instruction: str = ""
    answer_cue: str = ""
    system: str = ""
    separator: str = ""
    version: int = PROMPT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields that apply to `kind`, for `ftlevel.json`."""
        unused = () if self.kind == "plain" else _OF_PLAIN
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in unused and (value or name != "system")
        }

    def with_system(self, turns: Sequence[Turn]) -> list[Turn]:
        """Returns `turns`, preceded by the system prompt if they have none."""
        if not self.system or (turns and turns[0]["role"] == "system"):
            return list(turns)
        return [{"role": "system", "content": self.system}, *turns]

    def user_text(self, text: str) -> str:
        """Returns the instruction, an empty line, and `text`."""
        return f"{self.instruction}\n\n{text}" if self.instruction else text

    def plain_prompt(self, text: str, *, has_system: bool = False) -> str:
        """Returns `text` as a plain prompt, preceded by the system prompt unless `has_system`."""
        return self.plain_parts(text, "", has_system=has_system)[0]

    def plain_parts(self, source: str, target: str, *, has_system: bool) -> tuple[str, str]:
        """Returns prompt and answer, whose concatenation is the text of the row.

        A trailing space moves from prompt to answer, unless `target` begins with white space.
        """
        text = self.user_text(source)
        if self.system and not has_system:
            text = f"{self.system}\n\n{text}"
        if self.answer_cue:
            text = f"{text}\n\n{self.answer_cue} "
        elif not text[-1:].isspace():
            text += self.separator
        if not text.endswith(" "):
            return text, target
        return text[:-1], target if target[:1].isspace() else f" {target}"

    def resolve_separator(self, examples: Sequence[Any]) -> PromptFormat:
        """Returns the format with the separator that fits `examples` (all of one type).

        The separator is empty if all prompts end or all answers begin with white space, as in TRL,
        else a newline.
        """
        if self.kind != "plain":
            return self
        joined = bool(self.answer_cue) or all(map(_joins, examples))
        return replace(self, separator="" if joined else "\n")


def _joins(example: Any) -> bool:
    if isinstance(example, PlainText):
        return True
    content = example.content
    return bool(content.input_text[-1:].isspace() or content.target_text[:1].isspace())


def choose_format(tokenizer: Any, kind: str, instruction: str, answer_cue: str) -> PromptFormat:
    """Returns seq2seq for an encoder-decoder, else chat-template if there is one, else plain."""
    if kind == "encoder-decoder":
        return PromptFormat("seq2seq", instruction)
    if getattr(tokenizer, "chat_template", None):
        return PromptFormat("chat-template", instruction)
    return PromptFormat("plain", instruction, answer_cue)


def load_prompt_format(card: AdapterCard) -> PromptFormat | None:
    """Returns the prompt format in a model's `card`, or None; `InputError` if it is unknown."""
    if not card.prompt:
        return None
    names = {field.name for field in fields(PromptFormat)}
    version = PROMPT_VERSION if card.prompt.get("kind") == "plain" else None
    if not card.prompt.keys() <= names or card.prompt.get("version") != version:
        raise InputError(
            f"its ftlevel.json has prompts as {dict(card.prompt)}, written by another version of "
            "ftlevel. Install that version."
        )
    return PromptFormat(**card.prompt)


def encode_prompt(
    tokenizer: Any, prompt_format: PromptFormat, source: str, *, has_system: bool = False
) -> list[int]:
    """Returns the token ids of a prompt as in training; raises `InputError` if it is empty."""
    if prompt_format.kind == "seq2seq":
        return list(tokenizer(prompt_format.user_text(source))["input_ids"])
    if prompt_format.kind == "chat-template":
        turns = [{"role": "user", "content": prompt_format.user_text(source)}]
        return encode_chat_prompt(tokenizer, prompt_format.with_system(turns))
    text = prompt_format.plain_prompt(source, has_system=has_system)
    ids = strip_bos_eos(tokenizer(text)["input_ids"], tokenizer)
    if not ids:
        raise InputError("the prompt is empty, and the tokenizer has no token to begin with")
    return ids


def encode_chat_prompt(
    tokenizer: Any, turns: Sequence[Turn], tools: Sequence[dict[str, Any]] = ()
) -> list[int]:
    """Returns the token ids of `turns` and the generation prompt, without a space at the end."""
    text = render(tokenizer, turns, tools, generation_prompt=True).removesuffix(" ")
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def strip_bos_eos(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Returns `ids` without a duplicate BOS and without a final EOS."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = 1 if bos is not None and list(ids[:2]) == [bos, bos] else 0
    end = len(ids) - (eos is not None and list(ids[-1:]) == [eos])
    return list(ids[start:end])
