"""Example types, the builders that convert a row to each of them, and conversion of tables.

Text is never trimmed. A row without a usable text, answer or role raises `UnusableRowError`.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ftlevel.data.formats.columns import columns_exist
from ftlevel.data.formats.detect import Format, FormatSpec, RoleValues
from ftlevel.data.formats.turns import (
    Message,
    UnusableRowError,
    check_text,
    parse_json,
    parse_tool_list,
    parse_turns,
)
from ftlevel.data.sources.lines import LazySequence, LineRows
from ftlevel.data.sources.table import BadRow, Table, describe_bad_rows, json_type_name
from ftlevel.errors import InputError, join_names, quote


@dataclass(frozen=True)
class ExampleContent:
    """The texts of an example for the data checks.

    Attributes:
        input_text: prompt, user turns, or the text to classify.
        target_text: answer, assistant turns or plain text; "" for a label.
        before: everything before the last answer; "" if there is nothing.
        last: the last answer, or the label.
        is_generated: whether the model generates `target_text` after the input.
    """

    input_text: str
    target_text: str
    before: str
    last: str
    is_generated: bool = False
    roles: tuple[str, ...] = ()


def get_content(example: Any) -> ExampleContent:
    """Returns `example.content`; if the example has none, all of its text is the target."""
    content = getattr(example, "content", None)
    return (
        content
        if isinstance(content, ExampleContent)
        else ExampleContent("", example.key_text, "", "")
    )


@dataclass(frozen=True)
class Conversation:
    """Turns of a conversation and tools that the assistant can call; `row` is its table index."""

    messages: tuple[Message, ...]
    row: int
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def key_text(self) -> str:
        return "\0".join(f"{m.role}\0{m.content}" for m in self.messages)

    @property
    def content(self) -> ExampleContent:
        turns, roles = self.messages, tuple(turn.role for turn in self.messages)
        last = len(roles) - 1 - roles[::-1].index("assistant")
        before = [f"{m.role}\0{m.content}\0{m.extra or ''}" for m in turns[:last]]
        has_prompt = not {"system"}.issuperset(roles[:last])
        return ExampleContent(
            "\n".join(m.content for m in turns if m.content and m.role in ("user", "tool")),
            "\n".join(m.content for m in turns if m.content and m.role == "assistant"),
            "\0".join([*before, str(self.tools or "")]) if has_prompt else "",
            f"{turns[last].content}{turns[last].extra or ''}",
            is_generated=True,
            roles=roles,
        )


@dataclass(frozen=True)
class PlainText:
    """A text for language modeling; `row` is its index in the table."""

    text: str
    row: int

    @property
    def key_text(self) -> str:
        return self.text


@dataclass(frozen=True)
class SourceTarget:
    """A source text and its target; `row` is its index in the table."""

    source: str
    target: str
    row: int

    @property
    def key_text(self) -> str:
        return f"{self.source}\0{self.target}"

    @property
    def content(self) -> ExampleContent:
        return ExampleContent(self.source, self.target, self.source, self.target, is_generated=True)


@dataclass(frozen=True)
class LabeledText:
    """One or two texts with a class, several classes or a quantity; `row` is its table index."""

    text: str
    text_pair: str | None
    label: str | int | float | tuple[str | int, ...]
    row: int

    @property
    def key_text(self) -> str:
        return f"{self.text}\0{self.text_pair}\0{self.label}"

    @property
    def content(self) -> ExampleContent:
        text = self.text if self.text_pair is None else f"{self.text}\n{self.text_pair}"
        return ExampleContent(text, "", text, str(self.label))

    @property
    def classes(self) -> Sequence[str | int]:
        """The classes; raises `TypeError` for a quantity."""
        if isinstance(self.label, float):
            raise TypeError("a quantity is not a class")
        return self.label if isinstance(self.label, tuple) else (self.label,)


@dataclass(frozen=True)
class TaggedTokens:
    """Words with one tag each; `row` is its index in the table."""

    tokens: tuple[str, ...]
    tags: tuple[str | int, ...]
    row: int

    @property
    def key_text(self) -> str:
        return "\0".join((*self.tokens, *map(str, self.tags)))

    @property
    def content(self) -> ExampleContent:
        text = " ".join(self.tokens)
        return ExampleContent(text, "", text, " ".join(map(str, self.tags)))

    @property
    def classes(self) -> Sequence[str | int]:
        return tuple(dict.fromkeys(self.tags))


@dataclass(frozen=True)
class Question:
    """A question, the context, and the answers as (text, character offset in the context).

    Without answers, the question is unanswerable, as in SQuAD 2.0.
    """

    context: str
    question: str
    answers: tuple[tuple[str, int], ...]
    row: int

    @property
    def key_text(self) -> str:
        return f"{self.question}\0{self.context}\0{self.answers}"

    @property
    def content(self) -> ExampleContent:
        text = f"{self.question}\n{self.context}"
        return ExampleContent(text, "", text, str(self.answers))


class Example(Protocol):
    """Protocol of examples, i.e. rows converted for a task; a task may define its own class."""

    @property
    def row(self) -> int:
        """Index of the example in the table."""

    @property
    def key_text(self) -> str:
        """Text that identifies the example in duplicate checks."""


class ClassExample(Example, Protocol):
    """Protocol of examples with classes."""

    @property
    def classes(self) -> Sequence[str | int]:
        """The distinct classes of the example."""


def create_conversation(values: RoleValues) -> Conversation:
    """Create the `Conversation` of the current row."""
    tools = get_tools(values)
    return Conversation(with_system(_turns(values), values), values.index, tools)


def get_tools(values: RoleValues) -> tuple[dict[str, Any], ...]:
    """Returns the tools of the current row; empty without such a column."""
    return parse_tool_list(values.get("tools"), values.columns.get("tools", "tools"))


def with_system(turns: Sequence[Message], values: RoleValues) -> tuple[Message, ...]:
    """Returns `turns`, after the row's system prompt if they have none."""
    system = values.text_or_empty("system")
    has_own = not system or turns[0].role == "system"
    return tuple(turns) if has_own else (Message("system", system), *turns)


def _turns(values: RoleValues) -> list[Message]:
    for role in ("messages", "conversations"):
        if role in values:
            return parse_turns(values.get(role), values.columns[role], names=values.inner)
    prompt, completion = values.get("prompt"), values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        name = f"{values.columns['prompt']} + {values.columns['completion']}"
        return parse_turns([*prompt, *completion], name)
    target = "output" if "instruction" in values else "completion"
    return [Message("user", prompt_text(values)), Message("assistant", values.text(target))]


def prompt_text(values: RoleValues) -> str:
    """Returns the prompt's text, or an instruction with its input."""
    if "instruction" not in values:
        return values.text("prompt" if "prompt" in values else "text")
    return "\n\n".join(filter(None, (values.text("instruction"), values.text_or_empty("input"))))


def create_pair(values: RoleValues) -> SourceTarget:
    """Create a `SourceTarget`; a conversation must have one question and one answer."""
    for source, target in (("document", "summary"), ("source", "target")):
        if source in values:
            return SourceTarget(values.text(source), values.text(target), values.index)
    turns = with_system(_turns(values), values)
    order = [turn.role for turn in turns if turn.role != "system"]
    if order != ["user", "assistant"]:
        raise UnusableRowError(f"has {len(order)} turns, expected one question and one answer")
    source = "\n\n".join(turn.content for turn in turns[:-1])
    return SourceTarget(source, turns[-1].content, values.index)


def create_plain_text(values: RoleValues) -> PlainText:
    """Create the `PlainText` of the current row."""
    return PlainText(values.text("text"), values.index)


def create_labeled_text(values: RoleValues) -> LabeledText:
    """Create the `LabeledText` of the current row, with one class."""
    return _labeled(values, _class(values))


def create_multi_label_text(values: RoleValues) -> LabeledText:
    """Create the `LabeledText` of the current row, with a tuple of classes."""
    return _labeled(values, _classes(values))


def create_regression_text(values: RoleValues) -> LabeledText:
    """Create the `LabeledText` of the current row, with a quantity."""
    return _labeled(values, _quantity(values))


def _labeled(values: RoleValues, label: str | int | float | tuple[str | int, ...]) -> LabeledText:
    pair = values.text("text_pair") if "text_pair" in values else None
    return LabeledText(values.text("text"), pair, label, values.index)


_WHOLE = re.compile(r"-?\d+\.0+")


def _whole(label: Any) -> Any:
    """Returns `label`, a whole float as an integer: pandas writes them beside an empty cell."""
    return int(label) if type(label) is float and label.is_integer() else label


def _class(values: RoleValues) -> str | int:
    label, column = _whole(values.get("label")), repr(values.columns["label"])
    if isinstance(label, str) and _WHOLE.fullmatch(label):
        is_cell = values.table.has_text_cells(values.index)
        label = label.partition(".")[0] if is_cell else label
    if type(label) in (float, list):  # in all rows, so that dropping the row does not help
        message = (
            f"has decimals ({label}). Classes are names or whole numbers. To learn a quantity: "
            "--set data.problem_type=regression."
            if type(label) is float
            else "is a list, and with problem_type single_label_classification each row has one "
            "class. For several: --set data.problem_type=multi_label_classification."
        )
        raise InputError(f"{values.table.where(values.index)}: {column} {message}")
    return _name(label, column, values)


def _classes(values: RoleValues) -> tuple[str | int, ...]:
    labels, column = values.get("label"), repr(values.columns["label"])
    if isinstance(labels, str) and labels.lstrip().startswith("["):  # a CSV cell
        labels = parse_json(labels, column)
    if type(labels) is not list:
        raise UnusableRowError(f"{column} is {json_type_name(labels)}, not a list of labels")
    names = tuple(_name(name, f"label {i} of {column}", values) for i, name in enumerate(labels, 1))
    if len(set(names)) < len(names):
        raise UnusableRowError(
            f"{column} lists a label twice ({join_names(map(repr, names), 4)}); expected the "
            "names of the labels that apply, not a 0 or 1 for each"
        )
    return names


def _quantity(values: RoleValues) -> float:
    value, column = values.get("label"), repr(values.columns["label"])
    if type(value) not in (int, float, str):
        raise UnusableRowError(f"{column} is {json_type_name(value)}, not a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise UnusableRowError(f"{column} is {value!r}, not a number") from None
    if not math.isfinite(number):
        raise UnusableRowError(f"{column} is {value!r}, not a finite number")
    return number


def _name(label: object, column: str, values: RoleValues, role: str = "label") -> str | int:
    """Returns the class name of `label`; an integer stays if no name is declared for it."""
    label = _whole(label)
    if type(label) is bool:
        return "true" if label else "false"
    if type(label) is int:
        names = values.table.label_names.get(values.columns[role], ())
        return names[label] if 0 <= label < len(names) else label
    return check_text(label, column)


def create_tagged_tokens(values: RoleValues) -> TaggedTokens:
    """Create the `TaggedTokens` of the current row."""
    tokens, tags = values.get("tokens"), values.get("tags")
    for role, value in (("tokens", tokens), ("tags", tags)):
        if type(value) is not list:
            column = values.columns[role]
            raise UnusableRowError(f"{column!r} is {json_type_name(value)}, not a list")
    if len(tokens) != len(tags):
        raise UnusableRowError(f"has {len(tokens)} tokens, but {len(tags)} tags")
    if not tokens:
        raise UnusableRowError(f"{values.columns['tokens']!r} is empty")
    for number, token in enumerate(tokens, 1):
        check_text(token, f"token {number}")
    names = tuple(_name(tag, f"tag {i}", values, "tags") for i, tag in enumerate(tags, 1))
    return TaggedTokens(tuple(tokens), names, values.index)


def create_question(values: RoleValues) -> Question:
    """Create the `Question` of the current row."""
    context, question = values.text("context"), values.text("question")
    answers, column = values.get("answers"), values.columns["answers"]
    if type(answers) is not dict or not {"text", "answer_start"} <= answers.keys():
        expected = "{'text': [...], 'answer_start': [...]}"
        raise UnusableRowError(f"{column!r} is not like {expected}, as in SQuAD")
    texts, starts = answers["text"], answers["answer_start"]
    if type(texts) is not list or type(starts) is not list or len(texts) != len(starts):
        raise UnusableRowError(f"{column!r} needs two lists of one length")
    for text, start in zip(texts, starts, strict=True):
        check_text(text, "an answer")
        if type(start) is not int or context[start : start + len(text)] != text:
            raise UnusableRowError(f"the answer {text[:40]!r} is not at {start} of the context")
    return Question(context, question, tuple(zip(texts, starts, strict=True)), values.index)


PLAIN_TEXT = FormatSpec("text", create_plain_text, {"text": ("text", "content")})
"""Shape of a text whose tokens are all targets."""


def create_query_conversation(values: RoleValues) -> Conversation:
    """Create the conversation to answer, with final assistant turns of messages dropped."""
    for role in ("messages", "conversations", "prompt"):
        if role in values and (role != "prompt" or isinstance(values.get(role), list)):
            column = values.columns[role]
            turns = parse_turns(values.get(role), column, needs_assistant=False, names=values.inner)
            while role != "prompt" and turns and turns[-1].role == "assistant":
                turns.pop()
            break
    else:
        turns = [Message("user", prompt_text(values))]
    if not turns or turns[-1].role == "assistant":
        raise UnusableRowError("does not end with a turn to answer")
    return Conversation(with_system(turns, values), values.index, get_tools(values))


def create_source(values: RoleValues) -> SourceTarget:
    """Create a `SourceTarget` with an empty target, for generation."""
    for role in ("document", "source"):
        if role in values:
            return SourceTarget(values.text(role), "", values.index)
    turns = create_query_conversation(values).messages
    if [turn.role for turn in turns if turn.role != "system"] != ["user"]:
        raise UnusableRowError(f"has {len(turns)} turns, where one question is expected")
    return SourceTarget("\n\n".join(turn.content for turn in turns), "", values.index)


class LazyExamples(LazySequence[Example]):
    """Examples of a large table, built on access; `indices` are the rows that can be converted."""

    def __init__(self, table: Table, format_: Format, indices: Sequence[int]) -> None:
        self._table, self._indices = table, indices
        self._values = RoleValues(format_, table)
        self._build = format_.build

    def __len__(self) -> int:
        return len(self._indices)

    def _item(self, at: int) -> Example:
        index = self._indices[at]
        self._values.set_row(self._table.rows[index], index)
        example: Example = self._build(self._values)
        return example


def to_examples(table: Table, format_: Format) -> Sequence[Example]:
    """Returns the examples of `table`; raises `InputError` for invalid rows or missing columns."""
    examples, bad = convert_rows(table, format_)
    if bad:
        raise InputError(describe_bad_rows(table, bad, ""))
    return examples


def get_missing_columns(table: Table, format_: Format) -> list[str]:
    """Returns the columns of `format_` that `table` lacks, quoted for messages."""
    names = table.column_names
    return [
        quote(column) for column in format_.columns.values() if not columns_exist(column, names)
    ]


def convert_rows(table: Table, format_: Format) -> tuple[Sequence[Example], list[BadRow]]:
    """Returns the examples and `BadRow`s of `table`; raises `InputError` for a missing column."""
    if lacking := get_missing_columns(table, format_):
        raise InputError(
            f"{table.source}: has no column {join_names(lacking)}. Columns: "
            f"{join_names(map(quote, table.column_names))}. Use the same columns in every split."
        )
    values = RoleValues(format_, table)
    examples: list[Example] = []
    errors: list[BadRow] = []
    invalid: set[int] = set()
    is_lazy = isinstance(table.rows, LineRows)
    for index, row in enumerate(table.rows):
        values.set_row(row, index)
        try:
            example = format_.build(values)
        except UnusableRowError as error:
            errors.append(BadRow(table.lines[index], str(error), error.finding))
            invalid.add(index)
        else:
            if not is_lazy:
                examples.append(example)
    if not is_lazy:
        return examples, errors
    indices: Sequence[int] = range(len(table))
    if invalid:
        indices = array("q", (index for index in indices if index not in invalid))
    return LazyExamples(table, format_, indices), errors
