"""A chat template as texts around turns, for programs that have no Jinja.

The layout is found by rendering conversations with marks for contents, and is taken only if it
gives, for other conversations, exactly what the template gives.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftlevel.data.encoding.chat import Turn, render
from ftlevel.errors import InputError

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
_MARKS = {SYSTEM: "\u2042S\u2042", USER: "\u2042U\u2042", ASSISTANT: "\u2042A\u2042"}
_TRIALS = (
    ((USER, "Name three colours."),),
    ((USER, "a"), (ASSISTANT, "b\n\n    c"), (USER, "12 + 3?")),
    ((SYSTEM, "Be brief."), (USER, "é\n- ü"), (ASSISTANT, "x"), (USER, "y"), (ASSISTANT, "z"),
     (USER, "{ }")),
    ((SYSTEM, "Be brief."), (USER, "x")),
)  # fmt: skip


@dataclass(frozen=True)
class TurnLayout:
    """The texts around the turns.

    Attributes:
        around: role → what stands before and behind its content; no system where the template has
            none of its own.
        opening: what stands before a first turn that is not the system's, such as a default one.
        generation: what stands behind the last turn, for the answer to follow.
    """

    around: dict[str, tuple[str, str]]
    opening: str
    generation: str

    def render(self, turns: Sequence[Turn]) -> str:
        """Return the text of `turns`, up to where the answer begins."""
        parts = [self.opening if turns[0]["role"] != SYSTEM else ""]
        for turn in turns:
            before, after = self.around[turn["role"]]
            parts += [before, turn["content"], after]
        return "".join([*parts, self.generation])


def find_turn_layout(tokenizer: Any) -> TurnLayout | None:
    """Return the layout of the chat template of `tokenizer`, or None where it is more than one."""
    try:
        layout = _guess(tokenizer)
        if layout is None:
            return None
        for trial in _TRIALS:
            turns = [{"role": role, "content": content} for role, content in trial]
            if SYSTEM not in layout.around and turns[0]["role"] == SYSTEM:
                continue
            if layout.render(turns) != render(tokenizer, turns, generation_prompt=True):
                return None
    except InputError:  # it refuses a plain conversation
        return None
    return layout


def _guess(tokenizer: Any) -> TurnLayout | None:
    alone = _pieces(tokenizer, USER)
    talk = _pieces(tokenizer, USER, ASSISTANT, USER)
    if alone is None or talk is None:
        return None
    first, tail = alone
    _, to_assistant, to_user, _ = talk
    user_end = _shared(render(tokenizer, _marked(USER)).rpartition(_MARKS[USER])[2], to_assistant)
    assistant_begin = to_assistant.removeprefix(user_end)
    if not tail.startswith(user_end):
        return None
    if to_user.startswith(user_end) and first.endswith(to_user.removeprefix(user_end)):
        user_begin, assistant_end = to_user.removeprefix(user_end), user_end
    else:
        shared = _common_start(first[::-1], to_user[::-1])[::-1]
        user_begin = re.sub(r"^[^<\[]*[>\]]", "", shared)  # not from the middle of a token on
        assistant_end = to_user.removesuffix(user_begin)
    around = {USER: (user_begin, user_end), ASSISTANT: (assistant_begin, assistant_end)}
    system = _system(tokenizer, user_begin)
    if system is not None:
        around[SYSTEM] = system
    return TurnLayout(around, first.removesuffix(user_begin), tail.removeprefix(user_end))


def _system(tokenizer: Any, user_begin: str) -> tuple[str, str] | None:
    """Return what stands around a system text; None where it has no turn of its own."""
    try:
        pieces = _pieces(tokenizer, SYSTEM, USER)
    except InputError:
        return None
    if pieces is None or not pieces[1].endswith(user_begin):
        return None
    return pieces[0], pieces[1].removesuffix(user_begin)


def _shared(first: str, second: str) -> str:
    """Return what both begin with, without the beginning of a special token."""
    return re.sub(r"(<\|?|\[/?)$", "", _common_start(first, second))


def _common_start(first: str, second: str) -> str:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return "".join(one for one, _ in pairs)


def _marked(*roles: str) -> list[Turn]:
    return [{"role": role, "content": _MARKS[role]} for role in roles]


def _pieces(tokenizer: Any, *roles: str) -> list[str] | None:
    """Return the texts between the contents of `roles`; None where a content is not as it was."""
    text = render(tokenizer, _marked(*roles), generation_prompt=True)
    pieces = re.split("|".join(map(re.escape, _MARKS.values())), text)
    found = re.findall("|".join(map(re.escape, _MARKS.values())), text)
    return pieces if found == [_MARKS[role] for role in roles] else None
