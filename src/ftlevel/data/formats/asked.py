"""Rows that wait for an answer: what is asked of a trained model."""

from __future__ import annotations

from ftlevel.data.formats.examples import Conversation, Pair
from ftlevel.data.formats.roles import Roles
from ftlevel.data.formats.turns import Message, Unusable, parse_tools, parse_turns


def build_asked_turns(roles: Roles) -> Conversation:
    """Return the turns that wait for an answer; an answer that is there already is left out."""
    for role in ("messages", "conversations"):
        if role in roles:
            turns = parse_turns(
                roles.get(role), roles.columns[role], answered=False, names=roles.inner
            )
            while turns and turns[-1].role == "assistant":
                turns.pop()
            break
    else:
        turns = [Message("user", _asked_text(roles))]
    if not turns:
        raise Unusable("holds no turn that could be answered")
    if (system := roles.text_or_empty("system")) and turns[0].role != "system":
        turns.insert(0, Message("system", system))
    tools = parse_tools(roles.get("tools"), roles.columns["tools"]) if "tools" in roles else ()
    return Conversation(tuple(turns), roles.index, tools)


def _asked_text(roles: Roles) -> str:
    if "instruction" in roles:
        ask = roles.text("instruction")
        more = roles.text_or_empty("input")
        return f"{ask}\n\n{more}" if more else ask
    return roles.text("prompt" if "prompt" in roles else "text")


def build_source(roles: Roles) -> Pair:
    """Return a source without a target, as `build_pair` would make it of an answered row."""
    for role in ("document", "source"):
        if role in roles:
            return Pair(roles.text(role), "", roles.index)
    turns = build_asked_turns(roles).messages
    if [turn.role for turn in turns if turn.role != "system"] != ["user"]:
        raise Unusable(f"has {len(turns)} turns, where one question is expected")
    return Pair("\n\n".join(turn.content for turn in turns), "", roles.index)
