"""Parse conversations in the formats of OpenAI (role, content) and ShareGPT (from, value).

Roles are normalized to system, user, assistant and tool. Tool calls become part of the assistant's
turn, with arguments as an object, as chat templates expect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ftlevel.data.formats.columns import format_map_flags
from ftlevel.data.sources.table import is_encodable, json_type_name
from ftlevel.errors import did_you_mean, join_names

MAX_CHARACTERS = 1 << 23
"""Maximum length of a text; tokenizers need about 150 bytes of memory per character."""

_ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
_TEXT_KEYS = ("content", "value", "text", "message", "utterance")

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `content` is empty only for a tool call without text.

    `extra` holds the other keys that templates read: `tool_calls`, `tool_call_id`, `name`.
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the turn as a dict for chat templates: role, content and `extra`."""
        return {"role": self.role, "content": self.content, **self.extra}


class UnusableRowError(Exception):
    """A row cannot become an example; the message is the reason.

    `finding` is the field of `config.gate` that decides how to proceed, or "" for other defects.
    """

    def __init__(self, message: str, finding: str = "") -> None:
        super().__init__(message)
        self.finding = finding


def check_text(value: object, label: str) -> str:
    """Returns `value`; `UnusableRowError` with `label` if it is no string, blank or too long."""
    if value is None:
        raise UnusableRowError(f"{label} is null", "null_content")
    if type(value) is not str:
        raise UnusableRowError(f"{label} is {json_type_name(value)}, not a string")
    if not value.strip():
        raise UnusableRowError(f"{label} is empty", "empty_text")
    if not value.isascii() and not is_encodable(value):
        raise UnusableRowError(f"{label} has half of a surrogate pair, as of an emoji cut in two")
    if len(value) > MAX_CHARACTERS:
        raise UnusableRowError(
            f"{label} has {len(value):,} characters in one text, and at most {MAX_CHARACTERS:,} "
            "are encoded at once: break it into paragraphs or rows"
        )
    return value


def parse_turns(
    value: object,
    column: str,
    *,
    needs_assistant: bool = True,
    names: Mapping[str, str] | None = None,
) -> list[Message]:
    """Returns the turns of a list of objects; raises `UnusableRowError` for other values.

    `needs_assistant` requires an assistant turn. `names` are the data's names of `role`, `content`,
    `user` and `assistant`.
    """
    if type(value) is not list:
        finding = "null_content" if value is None else ""
        raise UnusableRowError(
            f"{column!r} is {json_type_name(value)}, where a list of turns is expected", finding
        )
    turns = [
        turn
        for number, item in enumerate(value, 1)
        if (turn := _parse_turn(item, f"turn {number} of {column!r}", names or {})) is not None
    ]
    if needs_assistant and not any(turn.role == "assistant" for turn in turns):
        raise UnusableRowError(f"{column!r} has no assistant turn", "unsupervised")
    return turns


def parse_tool_list(value: object, column: str) -> tuple[dict[str, Any], ...]:
    """Returns the tools in `value`, a list of objects or its JSON text; () if null or blank."""
    if isinstance(value, str):
        value = parse_json(value, repr(column)) if value.strip() else []
    if value is None:
        return ()
    if type(value) is not list or not all(isinstance(tool, dict) for tool in value):
        raise UnusableRowError(
            f"{column!r} is {json_type_name(value)}, where a list of tools is expected"
        )
    return tuple(value)


def _get_keys(item: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, str]:
    role = next((key for key in _ROLE_KEYS if key in item), "role")
    text = next((key for key in _TEXT_KEYS if key in item), _TEXT_KEYS[role == "from"])
    return names.get("role", role), names.get("content", text)


def _get_role(name: object, names: Mapping[str, str]) -> str | None:
    if not isinstance(name, str):
        return None
    renamed = next((role for role in ("user", "assistant") if names.get(role) == name), None)
    return renamed or _ROLES.get(name) or _ROLES.get(name.lower())


def _parse_turn(item: object, label: str, names: Mapping[str, str]) -> Message | None:
    if type(item) is not dict:
        raise UnusableRowError(
            f"{label} is {json_type_name(item)}, not an object with role and content"
        )
    role_key, text_key = _get_keys(item, names)
    calls = item.get("tool_calls")
    for key, part in ((role_key, "role"), (text_key, "content")):
        if key not in item and not (calls and key == text_key):
            keys = (role_key, text_key)
            others = [k for k, v in item.items() if isinstance(v, str) and k not in keys]
            hint, finding = "", "null_content" if part == "content" else ""
            if others:
                guess = format_map_flags({part: others[0 if part == "role" else -1]})
                hint, finding = f"; name it: {guess}", ""
            raise UnusableRowError(
                f"{label} has no {key!r} (keys: {join_names(item)}{hint})", finding
            )
    if item.get("weight") == 0:
        raise UnusableRowError(f"{label} has weight 0; per-turn weights are not supported")
    name, text = item[role_key], item.get(text_key)
    role = _get_role(name, names)
    if role is None:
        hint = did_you_mean(str(name), _ROLES).strip().lower()
        hint = hint or "known: system, user, assistant, tool, human, gpt"
        flag = format_map_flags({"user": str(name)})
        raise UnusableRowError(
            f"{label} has the unknown role {name!r} ({hint}; or map it: {flag}, or assistant=…)",
            "unknown_role",
        )
    if role == "system" and isinstance(text, str) and not text.strip():
        return None
    content = f"{text_key!r} of {label}"
    if type(text) is list:
        _refuse_parts(text, content)
    if name == "function_call":
        calls, text = parse_json(check_text(text, content), content), ""
        calls = calls if isinstance(calls, list) else [calls]
    extra: dict[str, Any] = {k: item[k] for k in ("name", "tool_call_id") if item.get(k)}
    if not calls and (call := item.get("function_call")):
        calls = [call]
    if calls:
        extra["tool_calls"] = [_parse_call(call, label) for call in calls]
    return Message(role, check_text(text, content) if text or not calls else "", extra)


def _refuse_parts(parts: Sequence[Any], label: str) -> NoReturn:
    types = [part.get("type", next(iter(part), "")) for part in parts if isinstance(part, dict)]
    type_name = next((type_ for type_ in types if type_ != "text"), None)
    if type_name is None:
        raise UnusableRowError(f"{label} is a list of parts, not a string; join their texts")
    raise UnusableRowError(
        f"{label} has a part of type {type_name!r}, and ftlevel trains on text only"
    )


def _parse_call(call: object, label: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise UnusableRowError(f"{label} has a tool call without a function and its name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"'arguments' of {label}")
    parsed = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **parsed} if isinstance(call, dict) and call.get("id") else parsed


def parse_json(text: str, label: str) -> Any:
    """Returns the value of the JSON `text`; `UnusableRowError` with `label` if it is invalid."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise UnusableRowError(f"{label} is not valid JSON ({error})") from None


def parse_turn_list(text: str) -> Any:
    """Returns the turns if `text` is JSON of a list of turns; else `text`."""
    try:
        turns = json.loads(text)
    except ValueError:
        return text
    is_turns = isinstance(turns, list) and all(
        isinstance(turn, dict) and _get_role(turn.get(_get_keys(turn, {})[0]), {}) for turn in turns
    )
    return turns if is_turns and turns else text
