"""Checks of an example's text: each tells whether something is wrong with one example."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from ftlevel.data.formats.parts import Parts

_TAG = re.compile(
    r"</?(?:p|br|div|span|img|font|script|style|table|thead|tbody|tr|td|th|ul|ol|li|h[1-6]|pre"
    r"|blockquote|strong|em|hr|sup|sub|small|center|html|head|body|iframe|button|form|input"
    r"|label|nav|section|article|header|footer)(?:\s[^<>]*)?/?>"
    r"|<a\s[^<>]*>|</[abiu]>"
    r"|&(?:amp|lt|gt|quot|apos|nbsp|copy|reg|hellip|mdash|ndash|[lr][sd]quo|#\d{1,6}|#x[\da-f]{1,5});",
    re.IGNORECASE,
)
_CODE = re.compile(r"(`+).*?\1", re.DOTALL)
_FEW_WORDS = 3


@dataclass(frozen=True)
class TextsKnown:
    """What checks of texts must know beside the text.

    Attributes:
        special: texts of the tokenizer's special tokens.
        starts: what every one of them begins with, in as few pieces as can be.
    """

    special: tuple[str, ...] = ()
    starts: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", tuple({text[:2] for text in self.special}))


def has_wrong_ends(parts: Parts, _: TextsKnown) -> bool:
    """Tell whether a conversation begins with the assistant, or does not end with it."""
    turns = [role for role in parts.roles if role != "system"]
    return bool(turns) and (turns[0] == "assistant" or turns[-1] != "assistant")


def has_lost_characters(parts: Parts, _: TextsKnown) -> bool:
    """Tell whether there is a NUL, or what stands for a character that could not be decoded."""
    asked, answered = parts.asked, parts.answered
    return "\ufffd" in answered or "\0" in answered or "\ufffd" in asked or "\0" in asked


def has_html(parts: Parts, _: TextsKnown) -> bool:
    """Tell whether there are tags or entities of HTML outside of what is marked as code."""
    for text in (parts.asked, parts.answered):
        if ("<" in text or "&" in text) and _TAG.search(text) and _TAG.search(_CODE.sub("", text)):
            return True
    return False


def has_special_token(parts: Parts, known: TextsKnown) -> bool:
    """Tell whether a prompt or an answer has the text of a special token.

    The tokenizer makes that token of it, here and wherever the rendered text is tokenized.
    """
    if not parts.written:
        return False
    for text in (parts.asked, parts.answered):
        for start in known.starts:
            if start in text and any(token in text for token in known.special):
                return True
    return False


def is_copy(parts: Parts, _: TextsKnown) -> bool:
    """Tell whether the answer is the prompt, of three words or more: names may be their own."""
    if not parts.written:
        return False
    asked, answered = parts.asked, parts.answered
    if abs(len(asked) - len(answered)) > _SPACES:
        return False
    words = answered.casefold().split()
    return len(words) >= _FEW_WORDS and words == asked.casefold().split()


_SPACES = 16

TEXT_CHECKS: dict[str, Callable[[Parts, TextsKnown], bool]] = {
    "turn_order": has_wrong_ends,
    "lost_characters": has_lost_characters,
    "html": has_html,
    "special_token_text": has_special_token,
    "answer_is_prompt": is_copy,
}
"""Field of `config.gate` → whether there is something wrong with an example."""
