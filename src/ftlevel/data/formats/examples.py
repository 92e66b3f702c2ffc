"""From rows to examples: the few canonical forms that every later room works on.

Text is taken as it stands; nothing is trimmed or joined but an instruction and its input. What
can't be learned from (no answer, no text, an unknown role) is collected and named by `path:line`.

What an example says, as the gate reads it: what is asked and what is answered.

The values of a row by what they are for: what every builder of examples reads.

Rows that wait for an answer: what is asked of a trained model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from ftlevel.data.formats.columns import JOINER, NESTED
from ftlevel.data.formats.detect import Format, Shape
from ftlevel.data.formats.turns import (
    Message,
    Unusable,
    check_text,
    parse_json,
    parse_tools,
    parse_turn_list,
    parse_turns,
)
from ftlevel.data.sources.table import Row, Table
from ftlevel.data.sources.uniform import kind_of
from ftlevel.errors import InputError, listing


@dataclass(frozen=True)
class Parts:
    """What an example says, as the gate reads it.

    Attributes:
        asked: what the model is given: a prompt, the user's turns, a text that has a class.
        answered: what it learns: an answer, the assistant's turns, a class; of a plain text all.
        before: all that stands before the last answer; empty where nothing does.
        last: that answer.
        written: whether `answered` is written by the model after what it is given.
        roles: of the turns of a conversation.
        one_class: whether `last` is a class of the whole.
    """

    asked: str
    answered: str
    before: str
    last: str
    written: bool = False
    roles: tuple[str, ...] = ()
    one_class: bool = False


def parts_of(example: Any) -> Parts:
    """Return the parts of an example; one that does not tell them is a text as a whole."""
    parts = getattr(example, "parts", None)
    return parts if isinstance(parts, Parts) else Parts("", example.key_text, "", "")


_TURNS = ("prompt", "completion", "chosen", "rejected")
"""Roles whose value is a text or turns."""


class Roles:
    """The values of one row, by role.

    Args:
        format_: which column each role has.
        table: where the rows are.
    """

    def __init__(self, format_: Format, table: Table) -> None:
        self.columns = format_.columns
        self.inner: Mapping[str, str] = format_.inner
        self.table = table
        self.row: Row = {}
        self.index = 0

    def turn_to(self, row: Row, index: int) -> None:
        """Go on with `row`, the one at `index` of the table."""
        self.row, self.index = row, index

    def __contains__(self, role: str) -> bool:
        return role in self.columns

    def get(self, role: str) -> Any:
        """Return the value of `role`; None where the format has no column for it.

        JSON text is parsed where a list or an object is expected, and in a CSV cell also where
        turns may stand instead of a text.
        """
        column = self.columns.get(role)
        if column is None:
            return None
        value = self._find(column)
        if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
            return value
        if role in NESTED:
            try:
                return parse_json(value, repr(column))
            except Unusable as error:
                raise Unusable(
                    f"{error}. Write lists and objects as JSON, with json.dumps"
                ) from None
        is_cell = role in _TURNS and self.table.has_text_cells(self.index)
        return parse_turn_list(value) if is_cell else value

    def _find(self, column: str) -> Any:
        """Return the value of a column, of several that are joined, or of a key inside of one."""
        if column in self.row:
            return self.row[column]
        if "+" in column:
            return JOINER.join(filter(None, map(self._joined, column.split("+"))))
        return self._reach(column)

    def _joined(self, column: str) -> str:
        """Return the text of a column that is joined with others; it may be empty or null."""
        value = self.row[column] if column in self.row else self._reach(column)
        if value is None or (isinstance(value, str) and not value.strip()):
            return ""
        if not isinstance(value, str):
            raise Unusable(f"{column!r} is {kind_of(value)}, and only texts can be joined")
        return value

    def _reach(self, column: str) -> Any:
        """Return the value inside of objects that `column` leads to, key by key."""
        value: Any = self.row
        for part in column.split("."):
            if value is self.row and part not in value:
                raise Unusable(f"has no {part!r}")
            if not isinstance(value, dict) or part not in value:
                raise Unusable(f"{column!r} is not there ({part!r} is missing)")
            value = value[part]
        return value

    def text(self, role: str) -> str:
        """Return the text of `role`, which must not be empty."""
        return check_text(self.get(role), repr(self.columns[role]))

    def text_or_empty(self, role: str) -> str:
        """Return the text of `role`, or an empty string for null, or for no such column."""
        value = self.get(role)
        if value is None or (isinstance(value, str) and not value.strip()):
            return ""
        return check_text(value, repr(self.columns[role]))


@dataclass(frozen=True)
class Conversation:
    """Turns with at least one of the assistant, and the tools that it may call.

    `row` is the index into the table.
    """

    messages: tuple[Message, ...]
    row: int
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def key_text(self) -> str:
        """The text by which the gate tells examples apart."""
        return "\0".join(f"{m.role}\0{m.content}" for m in self.messages)

    @property
    def parts(self) -> Parts:
        """What the user and the assistant say."""
        turns = self.messages
        asked = [m.content for m in turns if m.content and m.role in ("user", "tool")]
        answered = [m.content for m in turns if m.content and m.role == "assistant"]
        at = max(i for i, turn in enumerate(turns) if turn.role == "assistant")
        before = [f"{m.role}\0{m.content}\0{m.extra or ''}" for m in turns[:at]]
        asks = any(turn.role != "system" for turn in turns[:at])
        return Parts(
            "\n".join(asked),
            "\n".join(answered),
            "\0".join([*before, str(self.tools or "")]) if asks else "",
            f"{turns[at].content}{turns[at].extra or ''}",
            written=True,
            roles=tuple(turn.role for turn in turns),
        )


@dataclass(frozen=True)
class PlainText:
    """A text to continue; `row` is the index into the table."""

    text: str
    row: int

    @property
    def key_text(self) -> str:
        """The text by which the gate tells examples apart."""
        return self.text


@dataclass(frozen=True)
class Pair:
    """A text and what to make of it; `row` is the index into the table."""

    source: str
    target: str
    row: int

    @property
    def key_text(self) -> str:
        """The text by which the gate tells examples apart."""
        return f"{self.source}\0{self.target}"

    @property
    def parts(self) -> Parts:
        """The source and the target."""
        return Parts(self.source, self.target, self.source, self.target, written=True)


@dataclass(frozen=True)
class Labelled:
    """A text, or two, with its class, its classes or a quantity; `row` is the index."""

    text: str
    text_pair: str | None
    label: str | int | float | tuple[str | int, ...]
    row: int

    @property
    def key_text(self) -> str:
        """The text by which the gate tells examples apart."""
        return f"{self.text}\0{self.text_pair}\0{self.label}"

    @property
    def parts(self) -> Parts:
        """The texts and the label."""
        text = self.text if self.text_pair is None else f"{self.text}\n{self.text_pair}"
        return Parts(text, "", text, str(self.label), one_class=True)

    @property
    def classes(self) -> Sequence[str | int]:
        """The classes, each once; a quantity is none."""
        if isinstance(self.label, float):
            raise TypeError("a quantity is no class")
        return self.label if isinstance(self.label, tuple) else (self.label,)


@dataclass(frozen=True)
class Tagged:
    """Words with one tag each; `row` is the index into the table."""

    tokens: tuple[str, ...]
    tags: tuple[str | int, ...]
    row: int

    @property
    def key_text(self) -> str:
        """The text by which the gate tells examples apart."""
        return "\0".join((*self.tokens, *map(str, self.tags)))

    @property
    def parts(self) -> Parts:
        """The words and the tags."""
        text = " ".join(self.tokens)
        return Parts(text, "", text, " ".join(map(str, self.tags)))

    @property
    def classes(self) -> Sequence[str | int]:
        """The tags, each once."""
        return tuple(dict.fromkeys(self.tags))


@dataclass(frozen=True)
class Question:
    """A question with the spans of `context` that answer it, each a text and its start.

    No span means that the context has no answer, as in SQuAD 2.0.
    """

    context: str
    question: str
    answers: tuple[tuple[str, int], ...]
    row: int

    @property
    def key_text(self) -> str:
        """The text by which the gate tells examples apart."""
        return f"{self.question}\0{self.context}\0{self.answers}"

    @property
    def parts(self) -> Parts:
        """What is asked about which context, and the answers."""
        text = f"{self.question}\n{self.context}"
        return Parts(text, "", text, str(self.answers))


class Example(Protocol):
    """What every example has; a task may bring one of its own."""

    @property
    def row(self) -> int:
        """Its index in the table."""

    @property
    def key_text(self) -> str:
        """The text by which the gate tells examples apart."""


class Classed(Example, Protocol):
    """An example that has classes, to be numbered."""

    @property
    def classes(self) -> Sequence[str | int]:
        """Those that it has, each once."""


def build_conversation(roles: Roles) -> Conversation:
    """Return the turns of a row, and the tools they may call."""
    tools = parse_tools(roles.get("tools"), roles.columns["tools"]) if "tools" in roles else ()
    return Conversation(tuple(_turns(roles)), roles.index, tools)


def _turns(roles: Roles) -> list[Message]:
    """Return the turns of a row in any of the dialogue shapes."""
    for role in ("messages", "conversations"):
        if role in roles:
            turns = parse_turns(roles.get(role), roles.columns[role], names=roles.inner)
            break
    else:
        turns = _parse_prompt(roles)
    if (system := roles.text_or_empty("system")) and turns[0].role != "system":
        turns.insert(0, Message("system", system))
    return turns


def _parse_prompt(roles: Roles) -> list[Message]:
    """Return the two turns of a prompt, or an instruction with its input, and the answer."""
    if "instruction" in roles:
        ask = roles.text("instruction")
        if more := roles.text_or_empty("input"):
            ask = f"{ask}\n\n{more}"
        return [Message("user", ask), Message("assistant", roles.text("output"))]
    prompt, completion = roles.get("prompt"), roles.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        name = f"{roles.columns['prompt']} + {roles.columns['completion']}"
        return parse_turns([*prompt, *completion], name)
    return [
        Message("user", roles.text("prompt")),
        Message("assistant", roles.text("completion")),
    ]


def build_pair(roles: Roles) -> Pair:
    """Return a source and a target, also from a conversation of one question and one answer."""
    for source, target in (("document", "summary"), ("source", "target")):
        if source in roles:
            return Pair(roles.text(source), roles.text(target), roles.index)
    turns = _turns(roles)
    asked = [turn.content for turn in turns if turn.role != "assistant"]
    order = [turn.role for turn in turns if turn.role != "system"]
    if order != ["user", "assistant"]:
        raise Unusable(
            f"has {len(order)} turns, where one question and one answer make a source and a target"
        )
    return Pair("\n\n".join(asked), turns[-1].content, roles.index)


def build_plain(roles: Roles) -> PlainText:
    """Return a text."""
    return PlainText(roles.text("text"), roles.index)


def build_labelled(roles: Roles) -> Labelled:
    """Return a text with one class."""
    return _labelled(roles, _class(roles))


def build_multi_labelled(roles: Roles) -> Labelled:
    """Return a text with the classes that are true of it."""
    return _labelled(roles, _classes(roles))


def build_quantity(roles: Roles) -> Labelled:
    """Return a text with a quantity."""
    return _labelled(roles, _quantity(roles))


def _labelled(roles: Roles, label: str | int | float | tuple[str | int, ...]) -> Labelled:
    pair = roles.text("text_pair") if "text_pair" in roles else None
    return Labelled(roles.text("text"), pair, label, roles.index)


def _class(roles: Roles) -> str | int:
    label, column = roles.get("label"), repr(roles.columns["label"])
    if type(label) is float:
        _refuse_labels(
            roles,
            f"{column} is a fraction ({label}). Classes are names or whole numbers. To learn a "
            "quantity: --set data.problem_type=regression",
        )
    if type(label) is list:
        _refuse_labels(
            roles,
            f"{column} is a list, and with problem_type single_label_classification each row has "
            "one class. For several: --set data.problem_type=multi_label_classification",
        )
    return _name(label, column)


def _classes(roles: Roles) -> tuple[str | int, ...]:
    labels, column = roles.get("label"), repr(roles.columns["label"])
    if isinstance(labels, str) and labels.lstrip().startswith("["):  # a cell of CSV
        labels = parse_json(labels, column)
    if type(labels) is not list:
        raise Unusable(f"{column} is {kind_of(labels)}, not a list of labels")
    names = tuple(_name(name, f"label {i} of {column}") for i, name in enumerate(labels, 1))
    if len(set(names)) < len(names):
        raise Unusable(
            f"{column} names a label twice ({listing(map(repr, names), 4)}); it holds the names "
            "of the labels that are true, not a 0 or 1 for each"
        )
    return names


def _quantity(roles: Roles) -> float:
    value, column = roles.get("label"), repr(roles.columns["label"])
    if type(value) not in (int, float, str):
        raise Unusable(f"{column} is {kind_of(value)}, not a number")
    try:
        number = float(value)
    except ValueError:
        raise Unusable(f"{column} is {value!r}, not a number") from None
    if not math.isfinite(number):
        raise Unusable(f"{column} is {value!r}, not a finite number")
    return number


def _name(label: object, what: str) -> str | int:
    """Return the name or number of a class."""
    if type(label) is bool:
        return "true" if label else "false"
    if type(label) is int:
        return label
    return check_text(label, what)


def _refuse_labels(roles: Roles, reason: str) -> NoReturn:
    """Refuse the whole table: to leave such rows out would leave none."""
    raise InputError(f"{roles.table.where(roles.index)}: {reason}.")


def build_tagged(roles: Roles) -> Tagged:
    """Return words with their tags."""
    tokens, tags = roles.get("tokens"), roles.get("tags")
    for role, value in (("tokens", tokens), ("tags", tags)):
        if type(value) is not list:
            raise Unusable(f"{roles.columns[role]!r} is {kind_of(value)}, not a list")
    if len(tokens) != len(tags):
        raise Unusable(f"has {len(tokens)} tokens, but {len(tags)} tags")
    if not tokens:
        raise Unusable(f"{roles.columns['tokens']!r} is empty")
    for number, (token, tag) in enumerate(zip(tokens, tags, strict=True), 1):
        check_text(token, f"token {number}")
        if type(tag) is not int:
            check_text(tag, f"tag {number}")
    return Tagged(tuple(tokens), tuple(tags), roles.index)


def build_question(roles: Roles) -> Question:
    """Return a question with its context and answers."""
    context, question, found = roles.text("context"), roles.text("question"), roles.get("answers")
    if type(found) is not dict or not {"text", "answer_start"} <= found.keys():
        raise Unusable(f"{roles.columns['answers']!r} lacks 'text' and 'answer_start'")
    texts, starts = found["text"], found["answer_start"]
    if type(texts) is not list or type(starts) is not list or len(texts) != len(starts):
        raise Unusable(f"{roles.columns['answers']!r} needs two lists of one length")
    for text, start in zip(texts, starts, strict=True):
        check_text(text, "an answer")
        if type(start) is not int or context[start : start + len(text)] != text:
            raise Unusable(f"the answer {text[:40]!r} does not stand at {start} of the context")
    return Question(context, question, tuple(zip(texts, starts, strict=True)), roles.index)


PLAIN_TEXT = Shape("text", build_plain, {"text": ("text", "content")})
"""A text that is learned as a whole."""


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
