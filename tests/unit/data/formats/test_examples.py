"""Rows converted to examples, in the formats of real datasets, and rows that are rejected."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ftlevel.config import DataConfig
from ftlevel.data.formats.examples import (
    Conversation,
    Example,
    LabeledText,
    Message,
    PlainText,
    Question,
    SourceTarget,
    TaggedTokens,
    convert_rows,
    to_examples,
)
from ftlevel.data.sources.table import Table, handle_bad_rows
from ftlevel.errors import InputError
from ftlevel.tasks import TASKS

GEN, SUM, CLS = "text-generation", "summarization", "text-classification"
TAG, QA = "token-classification", "question-answering"
FIX = "Fix the line."
QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def make_table(*rows: dict[str, Any]) -> Table:
    return Table(list(rows), list(range(1, len(rows) + 1)), "x.jsonl")


def convert(task: str, *rows: dict[str, Any], **mapping: str) -> list[Example]:
    table = make_table(*rows)
    return to_examples(
        table, TASKS[task].get_format(table.column_names, DataConfig(columns=mapping))
    )


def make_conversation(*turns: str) -> Conversation:
    """Return a conversation from turns of the form "user: hello"."""
    parts = [turn.partition(": ") for turn in turns]
    return Conversation(tuple(Message(role, text) for role, _, text in parts), 0)


def answers(text, start):
    values = {"text": [text], "answer_start": [start]}
    return {"context": "é in Rome", "question": "q", "answers": values}


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "q", "completion": " a"}, ["user: q", "assistant:  a"]),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, ["user: q", "assistant: a"]),
        (
            {"instruction": "do", "input": "this", "output": "a"},
            ["user: do\n\nthis", "assistant: a"],
        ),
        (
            {"instruction": "do", "input": "", "output": "a", "system": "be"},
            ["system: be", "user: do", "assistant: a"],
        ),
        (
            {"instruction": "do", "input": None, "output": "a", "system": None},
            ["user: do", "assistant: a"],
        ),
        (
            {"messages": [{"role": "developer", "content": "s"}, QUESTION, ANSWER, QUESTION]},
            ["system: s", "user: q", "assistant: a", "user: q"],
        ),
        (
            {"messages": [{"role": "system", "content": ""}, QUESTION, ANSWER], "system": "s"},
            ["system: s", "user: q", "assistant: a"],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            ["user: q", "assistant: a"],
        ),
    ],
)
def test_rows_are_converted_to_conversations(row, turns):
    assert convert(GEN, row) == [make_conversation(*turns)]


@pytest.mark.parametrize(
    ("task", "row", "example"),
    [
        (GEN, {"text": " a\n"}, PlainText(" a\n", 0)),
        (SUM, {"document": "d", "summary": "s", "file": "f"}, SourceTarget("d", "s", 0)),
        (SUM, {"instruction": "do", "input": "i", "output": "a"}, SourceTarget("do\n\ni", "a", 0)),
        (
            SUM,
            {"messages": [{"role": "system", "content": "s"}, QUESTION, ANSWER]},
            SourceTarget("s\n\nq", "a", 0),
        ),
        (CLS, {"text": "t", "label": "animal"}, LabeledText("t", None, "animal", 0)),
        (CLS, {"text": "t", "label": True}, LabeledText("t", None, "true", 0)),
        (CLS, {"premise": "p", "hypothesis": "h", "label": 0}, LabeledText("p", "h", 0, 0)),
        (TAG, {"tokens": ["In"], "ner_tags": ["O"]}, TaggedTokens(("In",), ("O",), 0)),
        (QA, answers("Rome", 5), Question("é in Rome", "q", (("Rome", 5),), 0)),
    ],
)
def test_rows_are_converted_to_examples(task, row, example):
    assert convert(task, row) == [example]


def test_translation_with_mapping():
    row = {"en": "cat", "de": "Katze"}
    expected = [SourceTarget("cat", "Katze", 0)]
    assert convert("translation", row, source="en", target="de") == expected
    row = {"translation": row}
    assert convert("translation", row, source="translation.en", target="translation.de") == expected
    message = f"^x.jsonl:1: 'translation.dee' is not there \\('dee' is missing\\). {FIX}$"
    with pytest.raises(InputError, match=message):
        convert("translation", row, source="translation.en", target="translation.dee")


INVALID_MESSAGES: list[tuple[Any, str]] = [
    (None, "'messages' is null, where a list of turns is expected"),
    ("hello", "'messages' is a string, where a list of turns is expected"),
    ([], "'messages' has no assistant turn"),
    ([QUESTION], "'messages' has no assistant turn"),
    (
        [QUESTION, {"role": "critic", "content": "x"}, ANSWER],
        "turn 2 of 'messages' has the unknown role 'critic' (known: system, user, assistant, tool, "
        "human, gpt; or map it: --map user=critic, or assistant=…)",
    ),
    ([QUESTION, {"role": "assistant"}], "turn 2 of 'messages' has no 'content' (keys: role)"),
    (
        [{"role": "user", "content": [{"type": "text"}]}, ANSWER],
        "'content' of turn 1 of 'messages' is a list of parts, not a string; join their texts",
    ),
    (["hi"], "turn 1 of 'messages' is a string, not an object with role and content"),
    (
        [QUESTION, {"role": "assistant", "content": None, "tool_calls": [{}]}],
        "turn 2 of 'messages' has a tool call without a function and its name",
    ),
    (
        [QUESTION, {**ANSWER, "weight": 0}],
        "turn 2 of 'messages' has weight 0; per-turn weights are not supported",
    ),
]


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        *((GEN, {"messages": value}, reason) for value, reason in INVALID_MESSAGES),
        (
            GEN,
            {"conversations": [{"from": "human", "said": "q"}]},
            "turn 1 of 'conversations' has no 'value' (keys: from, said; name it: "
            "--map content=said)",
        ),
        (GEN, {"text": " "}, "'text' is empty"),
        (GEN, {"text": 5}, "'text' is a number, not a string"),
        (GEN, {"prompt": "q", "completion": ""}, "'completion' is empty"),
        (GEN, {"question": "", "answer": "a"}, "'question' is empty"),
        (GEN, {"instruction": "i", "input": 3, "output": "a"}, "'input' is a number, not a string"),
        (SUM, {"article": "d", "highlights": None}, "'highlights' is null"),
        (
            SUM,
            {"messages": [QUESTION, ANSWER, QUESTION, ANSWER]},
            "has 4 turns, expected one question and one answer",
        ),
        (CLS, {"text": "t", "label": None}, "'label' is null"),
        (CLS, {"text": "t", "label": ""}, "'label' is empty"),
        (CLS, {"text": "", "label": 1}, "'text' is empty"),
        (CLS, {"sentence1": "t", "sentence2": None, "label": 1}, "'sentence2' is null"),
        (TAG, {"tokens": ["a"], "tags": []}, "has 1 tokens, but 0 tags"),
        (TAG, {"tokens": [], "tags": []}, "'tokens' is empty"),
        (TAG, {"tokens": "a b", "tags": []}, "'tokens' is a string, not a list"),
        (TAG, {"tokens": ["a"], "tags": [None]}, "tag 1 is null"),
        (QA, answers("Rome", 2), "the answer 'Rome' is not at 2 of the context"),
        (
            QA,
            {"context": "c", "question": "q", "answers": "c"},
            "'answers' is not like {'text': [...], 'answer_start': [...]}, as in SQuAD",
        ),
    ],
)
def test_unusable_row_raises(task, row, reason):
    with pytest.raises(InputError) as error:
        convert(task, row)
    assert str(error.value) == f"x.jsonl:1: {reason}. {FIX}"


def test_unusable_rows_are_reported_together_or_dropped():
    texts = ["a", None, "", "b", *([""] * 5)]
    table = make_table(*({"text": text} for text in texts))
    detected = TASKS[GEN].get_format(["text"], DataConfig())
    with pytest.raises(InputError) as error:
        to_examples(table, detected)
    assert error.value.problems == [
        "x.jsonl:2: 'text' is null.",
        *(f"x.jsonl:{line}: 'text' is empty." for line in (3, 5, 6, 7)),
        "x.jsonl: 7 of 9 rows are bad (the first 5 are above). Fix them.",
    ]
    with pytest.raises(InputError, match="Fix them, or drop bad rows with --on-bad-row skip"):
        handle_bad_rows(table, convert_rows(table, detected)[1], "error")
    usable = handle_bad_rows(table, convert_rows(table, detected)[1], "skip")
    assert to_examples(usable, detected) == [PlainText("a", 0), PlainText("b", 1)]
    assert usable.where(1) == "x.jsonl:4"
    assert [row.line for row in usable.dropped] == [2, 3, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("label", "text_cells", "expected"),
    [(1.0, False, 1), (-1.0, False, -1), ("1.0", True, "1"), ("1.0", False, "1.0"),
     ("v1.0", True, "v1.0")],
)  # fmt: skip
def test_whole_numbers_written_as_floats_are_classes(label, text_cells, expected):
    """pandas writes them in a column with an empty cell."""
    table = replace(make_table({"text": "a", "label": label}), text_cells=text_cells)
    detected = TASKS[CLS].get_format(["text", "label"], DataConfig())
    assert to_examples(table, detected) == [LabeledText("a", None, expected, 0)]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            4.5,
            "x.jsonl:1: 'label' has decimals (4.5). Classes are names or whole numbers. To learn "
            "a quantity: --set data.problem_type=regression.",
        ),
        (
            ["a", "b"],
            "x.jsonl:1: 'label' is a list, and with problem_type single_label_classification each "
            "row has one class. For several: --set data.problem_type=multi_label_classification.",
        ),
    ],
)
def test_labels_of_another_problem_type_raise(label, message):
    with pytest.raises(InputError) as error:
        convert(CLS, {"text": "t", "label": label})
    assert str(error.value) == message


def test_split_without_column_raises():
    detected = TASKS[CLS].get_format(["text", "label"], DataConfig())
    with pytest.raises(InputError) as error:
        to_examples(make_table({"text": "t", "class": 1}), detected)
    assert str(error.value) == (
        "x.jsonl: has no column 'label'. Columns: 'text', 'class'. "
        "Use the same columns in every split."
    )
