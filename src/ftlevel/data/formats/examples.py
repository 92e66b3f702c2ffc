"""Example types, and the builders that convert a row to each of them.

Text is never trimmed. A row without a usable text, answer or role raises `UnusableRowError`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from ftlevel.data.formats.columns import JOINER, JSON_ROLES
from ftlevel.data.formats.detect import Format, FormatSpec
from ftlevel.data.formats.turns import (
    Message,
    UnusableRowError,
    check_text,
    parse_json,
    parse_tools,
    parse_turn_list,
    parse_turns,
)
from ftlevel.data.sources.table import Row, Table, json_type_name
from ftlevel.errors import InputError, join_names


@dataclass(frozen=True)
class ExampleParts:
    """The texts of an example for the checks of `gate`.

    Attributes:
        asked: input: prompt, user turns, or the text to classify.
        answered: target: answer, assistant turns, plain text; "" for a label.
        before: everything before the last answer; "" if there is nothing.
        last: the last answer, or the label.
        written: whether the model generates `answered` after the input.
        one_class: whether `last` is a class of the whole text.
    """

    asked: str
    answered: str
    before: str
    last: str
    written: bool = False
    roles: tuple[str, ...] = ()
    one_class: bool = False


def get_example_parts(example: Any) -> ExampleParts:
    """Return the parts of an example; by default, all of its text is the target."""
    parts = getattr(example, "parts", None)
    return parts if isinstance(parts, ExampleParts) else ExampleParts("", example.key_text, "", "")


_TURNS = ("prompt", "completion", "chosen", "rejected")
"""Roles whose value is a string or a list of turns."""


class RoleValues:
    """The values of the current row by role; `set_row` sets the row."""

    def __init__(self, format_: Format, table: Table) -> None:
        self.columns = format_.columns
        self.inner: Mapping[str, str] = format_.inner
        self.table = table
        self.row: Row = {}
        self.index = 0

    def set_row(self, row: Row, index: int) -> None:
        """Set the current row, which has position `index` in the table."""
        self.row, self.index = row, index

    def __contains__(self, role: str) -> bool:
        return role in self.columns

    def get(self, role: str) -> Any:
        """Return the value of `role`; None if the format has no column for it.

        JSON text is parsed for roles of lists or objects and, in CSV cells, for roles that may hold
        turns.
        """
        column = self.columns.get(role)
        if column is None:
            return None
        value = self._find(column)
        if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
            return value
        if role in JSON_ROLES:
            try:
                return parse_json(value, repr(column))
            except UnusableRowError as error:
                raise UnusableRowError(
                    f"{error}. Write lists and objects as JSON, with json.dumps"
                ) from None
        is_cell = role in _TURNS and self.table.has_text_cells(self.index)
        return parse_turn_list(value) if is_cell else value

    def _find(self, column: str) -> Any:
        """Return the value of a column, of several joined columns, or of a nested key."""
        if column in self.row:
            return self.row[column]
        if "+" in column:
            return JOINER.join(filter(None, map(self._joined, column.split("+"))))
        return self._reach(column)

    def _joined(self, column: str) -> str:
        """Return the text of one of several joined columns; "" if it is null or blank."""
        value = self.row[column] if column in self.row else self._reach(column)
        if value is None or (isinstance(value, str) and not value.strip()):
            return ""
        if not isinstance(value, str):
            raise UnusableRowError(
                f"{column!r} is {json_type_name(value)}, and only texts can be joined"
            )
        return value

    def _reach(self, column: str) -> Any:
        """Return the value of a nested key such as `answers.text`."""
        value: Any = self.row
        for part in column.split("."):
            if value is self.row and part not in value:
                raise UnusableRowError(f"has no {part!r}")
            if not isinstance(value, dict) or part not in value:
                raise UnusableRowError(f"{column!r} is not there ({part!r} is missing)")
            value = value[part]
        return value

    def text(self, role: str) -> str:
        """Return the text of `role`; raise `UnusableRowError` if it is empty."""
        return check_text(self.get(role), repr(self.columns[role]))

    def text_or_empty(self, role: str) -> str:
        """Return the text of `role`; "" if it is null or blank, or has no column."""
        value = self.get(role)
        if value is None or (isinstance(value, str) and not value.strip()):
            return ""
        return check_text(value, repr(self.columns[role]))


@dataclass(frozen=True)
class Conversation:
    """Turns of a conversation and the tools that the assistant can call; `row` is a table index."""

    messages: tuple[Message, ...]
    row: int
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def key_text(self) -> str:
        """Text that identifies the example in duplicate checks."""
        return "\0".join(f"{m.role}\0{m.content}" for m in self.messages)

    @property
    def parts(self) -> ExampleParts:
        """The user's and the assistant's texts."""
        turns = self.messages
        asked = [m.content for m in turns if m.content and m.role in ("user", "tool")]
        answered = [m.content for m in turns if m.content and m.role == "assistant"]
        at = max(i for i, turn in enumerate(turns) if turn.role == "assistant")
        before = [f"{m.role}\0{m.content}\0{m.extra or ''}" for m in turns[:at]]
        asks = any(turn.role != "system" for turn in turns[:at])
        return ExampleParts(
            "\n".join(asked),
            "\n".join(answered),
            "\0".join([*before, str(self.tools or "")]) if asks else "",
            f"{turns[at].content}{turns[at].extra or ''}",
            written=True,
            roles=tuple(turn.role for turn in turns),
        )


@dataclass(frozen=True)
class PlainText:
    """A text to continue; `row` is the table index."""

    text: str
    row: int

    @property
    def key_text(self) -> str:
        """Text that identifies the example in duplicate checks."""
        return self.text


@dataclass(frozen=True)
class SourceTarget:
    """A source text and its target; `row` is the table index."""

    source: str
    target: str
    row: int

    @property
    def key_text(self) -> str:
        """Text that identifies the example in duplicate checks."""
        return f"{self.source}\0{self.target}"

    @property
    def parts(self) -> ExampleParts:
        """The source and the target."""
        return ExampleParts(self.source, self.target, self.source, self.target, written=True)


@dataclass(frozen=True)
class LabeledText:
    """One or two texts with a class, several classes or a quantity; `row` is the table index."""

    text: str
    text_pair: str | None
    label: str | int | float | tuple[str | int, ...]
    row: int

    @property
    def key_text(self) -> str:
        """Text that identifies the example in duplicate checks."""
        return f"{self.text}\0{self.text_pair}\0{self.label}"

    @property
    def parts(self) -> ExampleParts:
        """The texts and the label."""
        text = self.text if self.text_pair is None else f"{self.text}\n{self.text_pair}"
        return ExampleParts(text, "", text, str(self.label), one_class=True)

    @property
    def classes(self) -> Sequence[str | int]:
        """The classes; raises `TypeError` for a quantity."""
        if isinstance(self.label, float):
            raise TypeError("a quantity is no class")
        return self.label if isinstance(self.label, tuple) else (self.label,)


@dataclass(frozen=True)
class TaggedTokens:
    """Words with one tag each; `row` is the table index."""

    tokens: tuple[str, ...]
    tags: tuple[str | int, ...]
    row: int

    @property
    def key_text(self) -> str:
        """Text that identifies the example in duplicate checks."""
        return "\0".join((*self.tokens, *map(str, self.tags)))

    @property
    def parts(self) -> ExampleParts:
        """The words and the tags."""
        text = " ".join(self.tokens)
        return ExampleParts(text, "", text, " ".join(map(str, self.tags)))

    @property
    def classes(self) -> Sequence[str | int]:
        """The distinct tags."""
        return tuple(dict.fromkeys(self.tags))


@dataclass(frozen=True)
class Question:
    """A question, its context, and the answers as (text, character offset in the context).

    Without answers, the question is unanswerable, as in SQuAD 2.0.
    """

    context: str
    question: str
    answers: tuple[tuple[str, int], ...]
    row: int

    @property
    def key_text(self) -> str:
        """Text that identifies the example in duplicate checks."""
        return f"{self.question}\0{self.context}\0{self.answers}"

    @property
    def parts(self) -> ExampleParts:
        """The question with its context, and the answers."""
        text = f"{self.question}\n{self.context}"
        return ExampleParts(text, "", text, str(self.answers))


class Example(Protocol):
    """Protocol of all examples; tasks may define their own."""

    @property
    def row(self) -> int:
        """Index in the table."""

    @property
    def key_text(self) -> str:
        """Text that identifies the example in duplicate checks."""


class ClassExample(Example, Protocol):
    """Protocol of examples with classes."""

    @property
    def classes(self) -> Sequence[str | int]:
        """The distinct classes of the example."""


def build_conversation(roles: RoleValues) -> Conversation:
    """Return the conversation of a row."""
    tools = parse_tools(roles.get("tools"), roles.columns["tools"]) if "tools" in roles else ()
    return Conversation(tuple(_turns(roles)), roles.index, tools)


def _turns(roles: RoleValues) -> list[Message]:
    """Return the turns of a row in any conversation format."""
    for role in ("messages", "conversations"):
        if role in roles:
            turns = parse_turns(roles.get(role), roles.columns[role], names=roles.inner)
            break
    else:
        turns = _parse_prompt(roles)
    if (system := roles.text_or_empty("system")) and turns[0].role != "system":
        turns.insert(0, Message("system", system))
    return turns


def _parse_prompt(roles: RoleValues) -> list[Message]:
    """Return the turns of a prompt, or of an instruction with its input, and of the answer."""
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


def build_pair(roles: RoleValues) -> SourceTarget:
    """Return a source and a target; a conversation must have one question and one answer."""
    for source, target in (("document", "summary"), ("source", "target")):
        if source in roles:
            return SourceTarget(roles.text(source), roles.text(target), roles.index)
    turns = _turns(roles)
    asked = [turn.content for turn in turns if turn.role != "assistant"]
    order = [turn.role for turn in turns if turn.role != "system"]
    if order != ["user", "assistant"]:
        raise UnusableRowError(f"has {len(order)} turns, expected one question and one answer")
    return SourceTarget("\n\n".join(asked), turns[-1].content, roles.index)


def build_plain(roles: RoleValues) -> PlainText:
    """Return the text of a row."""
    return PlainText(roles.text("text"), roles.index)


def build_labeled_text(roles: RoleValues) -> LabeledText:
    """Return a text with one class."""
    return _labelled(roles, _class(roles))


def build_multi_label_text(roles: RoleValues) -> LabeledText:
    """Return a text with its classes."""
    return _labelled(roles, _classes(roles))


def build_regression_text(roles: RoleValues) -> LabeledText:
    """Return a text with a quantity."""
    return _labelled(roles, _quantity(roles))


def _labelled(roles: RoleValues, label: str | int | float | tuple[str | int, ...]) -> LabeledText:
    pair = roles.text("text_pair") if "text_pair" in roles else None
    return LabeledText(roles.text("text"), pair, label, roles.index)


def _class(roles: RoleValues) -> str | int:
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


def _classes(roles: RoleValues) -> tuple[str | int, ...]:
    labels, column = roles.get("label"), repr(roles.columns["label"])
    if isinstance(labels, str) and labels.lstrip().startswith("["):  # a CSV cell
        labels = parse_json(labels, column)
    if type(labels) is not list:
        raise UnusableRowError(f"{column} is {json_type_name(labels)}, not a list of labels")
    names = tuple(_name(name, f"label {i} of {column}") for i, name in enumerate(labels, 1))
    if len(set(names)) < len(names):
        raise UnusableRowError(
            f"{column} lists a label twice ({join_names(map(repr, names), 4)}); expected the "
            f"names of the labels that apply, not a 0 or 1 for each"
        )
    return names


def _quantity(roles: RoleValues) -> float:
    value, column = roles.get("label"), repr(roles.columns["label"])
    if type(value) not in (int, float, str):
        raise UnusableRowError(f"{column} is {json_type_name(value)}, not a number")
    try:
        number = float(value)
    except ValueError:
        raise UnusableRowError(f"{column} is {value!r}, not a number") from None
    if not math.isfinite(number):
        raise UnusableRowError(f"{column} is {value!r}, not a finite number")
    return number


def _name(label: object, what: str) -> str | int:
    """Return the name or number of a class; booleans become "true" and "false"."""
    if type(label) is bool:
        return "true" if label else "false"
    if type(label) is int:
        return label
    return check_text(label, what)


def _refuse_labels(roles: RoleValues, reason: str) -> NoReturn:
    """Raise `InputError` for the whole table, as all of its rows have the same problem."""
    raise InputError(f"{roles.table.where(roles.index)}: {reason}.")


def build_tagged(roles: RoleValues) -> TaggedTokens:
    """Return words with their tags."""
    tokens, tags = roles.get("tokens"), roles.get("tags")
    for role, value in (("tokens", tokens), ("tags", tags)):
        if type(value) is not list:
            raise UnusableRowError(
                f"{roles.columns[role]!r} is {json_type_name(value)}, not a list"
            )
    if len(tokens) != len(tags):
        raise UnusableRowError(f"has {len(tokens)} tokens, but {len(tags)} tags")
    if not tokens:
        raise UnusableRowError(f"{roles.columns['tokens']!r} is empty")
    for number, (token, tag) in enumerate(zip(tokens, tags, strict=True), 1):
        check_text(token, f"token {number}")
        if type(tag) is not int:
            check_text(tag, f"tag {number}")
    return TaggedTokens(tuple(tokens), tuple(tags), roles.index)


def build_question(roles: RoleValues) -> Question:
    """Return a question with its context and answers."""
    context, question, found = roles.text("context"), roles.text("question"), roles.get("answers")
    if type(found) is not dict or not {"text", "answer_start"} <= found.keys():
        raise UnusableRowError(f"{roles.columns['answers']!r} lacks 'text' and 'answer_start'")
    texts, starts = found["text"], found["answer_start"]
    if type(texts) is not list or type(starts) is not list or len(texts) != len(starts):
        raise UnusableRowError(f"{roles.columns['answers']!r} needs two lists of one length")
    for text, start in zip(texts, starts, strict=True):
        check_text(text, "an answer")
        if type(start) is not int or context[start : start + len(text)] != text:
            raise UnusableRowError(f"the answer {text[:40]!r} is not at {start} of the context")
    return Question(context, question, tuple(zip(texts, starts, strict=True)), roles.index)


PLAIN_TEXT = FormatSpec("text", build_plain, {"text": ("text", "content")})
"""Shape of a text whose tokens are all targets."""


def build_query_turns(roles: RoleValues) -> Conversation:
    """Return the conversation to answer, without assistant turns at its end."""
    for role in ("messages", "conversations", "prompt"):
        if role in roles and (role != "prompt" or isinstance(roles.get(role), list)):
            turns = parse_turns(
                roles.get(role), roles.columns[role], answered=False, names=roles.inner
            )
            while turns and turns[-1].role == "assistant":
                turns.pop()
            break
    else:
        turns = [Message("user", _query_text(roles))]
    if not turns:
        raise UnusableRowError("contains no turn to answer")
    if (system := roles.text_or_empty("system")) and turns[0].role != "system":
        turns.insert(0, Message("system", system))
    tools = parse_tools(roles.get("tools"), roles.columns["tools"]) if "tools" in roles else ()
    return Conversation(tuple(turns), roles.index, tools)


def _query_text(roles: RoleValues) -> str:
    if "instruction" in roles:
        ask = roles.text("instruction")
        more = roles.text_or_empty("input")
        return f"{ask}\n\n{more}" if more else ask
    return roles.text("prompt" if "prompt" in roles else "text")


def build_source(roles: RoleValues) -> SourceTarget:
    """Return a source with an empty target, for generation."""
    for role in ("document", "source"):
        if role in roles:
            return SourceTarget(roles.text(role), "", roles.index)
    turns = build_query_turns(roles).messages
    if [turn.role for turn in turns if turn.role != "system"] != ["user"]:
        raise UnusableRowError(f"has {len(turns)} turns, where one question is expected")
    return SourceTarget("\n\n".join(turn.content for turn in turns), "", roles.index)
