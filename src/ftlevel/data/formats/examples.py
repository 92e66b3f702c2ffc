"""From rows to examples: the few canonical forms that every later room works on.

Text is taken as it stands; nothing is trimmed or joined but an instruction and its input. What
can't be learned from (no answer, no text, an unknown role) is collected and named by `path:line`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from ftlevel.data.formats.detect import Shape
from ftlevel.data.formats.parts import Parts
from ftlevel.data.formats.roles import Roles
from ftlevel.data.formats.turns import (
    Message,
    Unusable,
    check_text,
    parse_json,
    parse_tools,
    parse_turns,
)
from ftlevel.data.sources.uniform import kind_of
from ftlevel.errors import InputError, listing


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
