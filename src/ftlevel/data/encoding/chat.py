"""Conversations through a chat template, and which characters of the text are the assistant's.

A template that marks them ({% generation %}) is believed. With any other, each turn is found by
rendering what is before it and what is up to it, which must both begin the whole text. Templates
that change earlier turns when a later one is added (Qwen3 takes their reasoning out, Mistral moves
the system text) fail that check. There the turn is found by a mark that is put before its content
and behind it, and that must be the only difference between the texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftlevel.errors import InputError
from ftlevel.models.upstream.data import apply_template

Turn = dict[str, Any]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OF_PYTHON = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError)
_MARK = "\u2042mark\u2042"


@dataclass(frozen=True)
class Rendered:
    """A text and the spans of characters in it that the model is to learn."""

    text: str
    spans: tuple[tuple[int, int], ...]


def render(
    tokenizer: Any,
    turns: Sequence[Turn],
    tools: Sequence[dict[str, Any]] = (),
    *,
    generation_prompt: bool = False,
) -> str:
    """Return the text of `turns` by the chat template.

    Raises:
        InputError: the template refuses them.
    """
    return _render(tokenizer, turns, tools, generation_prompt=generation_prompt)[0]


def render_chat(
    tokenizer: Any, turns: Sequence[Turn], tools: Sequence[dict[str, Any]] = ()
) -> Rendered:
    """Render `turns` and find each assistant turn in the text, with the token that ends it.

    Raises:
        InputError: the template refuses the turns, leaves one or the tools out, or changes them so
            that the answers cannot be told apart.
    """
    ends = special_texts(tokenizer)
    marked = bool(_GENERATION.search(tokenizer.get_chat_template(None, list(tools) or None)))
    text, spans = _render(tokenizer, turns, tools, marks=marked)
    if not marked:
        spans = [
            _find_turn(tokenizer, turns, tools, index, text)
            for index, turn in enumerate(turns)
            if turn["role"] == "assistant"
        ]
    _check_complete(tokenizer, turns, tools, text)
    return Rendered(text, tuple(_with_end(text, span, ends) for span in spans))


def special_texts(tokenizer: Any) -> tuple[str, ...]:
    """Return the texts of the special tokens, without BOS."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    texts = {token.content for token in added.values() if token.special}
    return tuple((texts | set(tokenizer.all_special_tokens)) - {tokenizer.bos_token})


def turn_end(tokenizer: Any) -> int | None:
    """Return the id of the token that ends an assistant's turn; None where it is none or several.

    Raises:
        InputError: the template refuses a question and an answer.
    """
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = render_chat(tokenizer, talk)
    answer = rendered.text[slice(*rendered.spans[-1])] if rendered.spans else ""
    end = next((t for t in special_texts(tokenizer) if answer.endswith(t)), None)
    return tokenizer.convert_tokens_to_ids(end) if end else None


def _render(
    tokenizer: Any,
    turns: Sequence[Turn],
    tools: Sequence[dict[str, Any]],
    *,
    generation_prompt: bool = False,
    marks: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text, and the spans that the template marks if `marks` is true."""
    from jinja2 import TemplateError

    given = list(tools) or None
    try:
        return apply_template(
            turns,
            tokenizer.get_chat_template(None, given),
            tools=given,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TimeoutError, MemoryError, RecursionError, *_OF_PYTHON) as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"the chat template refuses these messages: {reason}.") from None


def _find_turn(
    tokenizer: Any,
    turns: Sequence[Turn],
    tools: Sequence[dict[str, Any]],
    index: int,
    full: str,
) -> tuple[int, int]:
    """Return the span of the turn at `index` in `full`, the text of all `turns`.

    It begins where generation would begin and ends behind the token that ends the turn; white space
    after that is the template's. A space before the answer belongs to it, as tokenizers join them.
    """
    before = render(tokenizer, turns[:index], tools, generation_prompt=True) if index else ""
    before = before.removesuffix(" ")
    upto = render(tokenizer, turns[: index + 1], tools)
    follows = bool(before) and full.startswith(before)
    if follows and full.startswith(upto) and len(before) < len(upto):
        return len(before), len(upto.rstrip())
    content = str(turns[index]["content"])
    if turns[index].get("tool_calls"):
        closing = next((t for t in special_texts(tokenizer) if upto.rstrip().endswith(t)), None)
        end = full.find(closing, len(before)) if follows and closing else -1
        if closing and end >= 0:
            return len(before), end + len(closing)
    for own in (content, content.strip()):
        start = _find_mark(tokenizer, turns, tools, index, _MARK + own, full)
        end = _find_mark(tokenizer, turns, tools, index, own + _MARK, full)
        if own and 0 <= start < end:
            return (len(before) if follows and len(before) <= start else start), end
    raise InputError(
        f"the chat template of {tokenizer.name_or_path} changes earlier turns when a later one is "
        f"added (message {index + 1}), so that the answers cannot be told apart. Use another one: "
        "--chat-template."
    )


def _find_mark(
    tokenizer: Any,
    turns: Sequence[Turn],
    tools: Sequence[dict[str, Any]],
    index: int,
    content: str,
    full: str,
) -> int:
    """Return where the mark in `content` stands, if it is all that it adds to `full`; else -1."""
    changed = [*turns[:index], {**turns[index], "content": content}, *turns[index + 1 :]]
    text = render(tokenizer, changed, tools)
    at = text.find(_MARK)
    return at if at >= 0 and text[:at] + text[at + len(_MARK) :] == full else -1


def _with_end(text: str, span: tuple[int, int], ends: Sequence[str]) -> tuple[int, int]:
    """Return `span` without white space at its end, and with the special token that ends it."""
    start, end = span
    stripped = start + len(text[start:end].rstrip())
    if any(text[start:stripped].endswith(token) for token in ends):
        return start, stripped
    for after in (end, end + (text[end : end + 1] == " ")):  # an answer may end in white space
        closing = next((token for token in ends if text.startswith(token, after)), None)
        if closing:
            return start, after + len(closing)
    return span


def _check_complete(
    tokenizer: Any, turns: Sequence[Turn], tools: Sequence[dict[str, Any]], text: str
) -> None:
    """Raise if the template left out a turn that the model should see, or the tools."""
    for number, turn in enumerate(turns, 1):
        content = str(turn["content"]).strip()
        if turn["role"] == "assistant" or content in text:
            continue
        if json.dumps(content)[1:-1] not in text:
            raise InputError(
                f"the chat template of {tokenizer.name_or_path} leaves out message {number}, of "
                f"role {turn['role']!r}. Use a template that shows it: --chat-template."
            )
    if tools and render(tokenizer, turns) == text:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} does not show tools to the model. "
            "Use one that does: --chat-template qwen."
        )
