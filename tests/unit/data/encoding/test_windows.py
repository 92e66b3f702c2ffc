from __future__ import annotations

from itertools import pairwise

import pytest

from ftlevel.data.encoding.row import Encoded
from ftlevel.data.encoding.spans import Window, encode_questions, get_span
from ftlevel.data.formats.examples import Question
from ftlevel.errors import InputError
from tiny_models import FAMILIES
from tiny_tokenizers import build_tokenizer

CONTEXT = "The parser reads a file. The module name is argparse 42, it is said. " * 3
ANSWER = "argparse 42"


def make_question(text: str = ANSWER, start: int | None = None) -> Question:
    position = CONTEXT.index(text) if start is None else start
    return Question(CONTEXT, "What is the name?", ((text, position),), 0)


def encode(
    family: str, example: Question, length: int = 60, stride: int = 16, drop: bool = False
) -> list[Window]:
    tokenizer = build_tokenizer(family, None)
    rows, _ = encode_questions(
        tokenizer, [example], length=length, stride=stride, separator="\n",
        where=lambda i: f"x.jsonl:{i + 1}", drop=drop,
    )  # fmt: skip
    return [as_window(row) for row in rows]


def as_window(row: Encoded) -> Window:
    assert isinstance(row, Window)
    return row


@pytest.mark.parametrize("family", FAMILIES)
def test_window_labels_cover_answer(family):
    windows = encode(family, make_question())
    assert len(windows) > 1
    begin, end = make_question().answers[0][1], make_question().answers[0][1] + len(ANSWER)
    num_answers = 0
    for window in windows:
        assert len(window.input_ids) <= 60
        first, last = window.labels  # type: ignore[misc]
        covered = window.offsets[0][0] <= begin and window.offsets[-1][1] >= end
        if (first, last) == (0, 0):
            assert not covered
            continue
        num_answers += 1
        answer_start = window.offsets[first - window.context_start][0]
        answer_end = window.offsets[last - window.context_start][1]
        assert CONTEXT[answer_start:answer_end].strip() == ANSWER
    assert num_answers >= 1


@pytest.mark.parametrize("text", [f" {ANSWER}", f"{ANSWER}, ", f" {ANSWER}, "])
@pytest.mark.parametrize("family", FAMILIES)
def test_answer_may_begin_or_end_with_a_space(family, text):
    stripped = encode(family, make_question(text.strip()))
    windows = encode(family, make_question(text))
    assert [window.labels for window in windows] == [window.labels for window in stripped]


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_windows_overlap_and_cover_the_context(family):
    windows = encode(family, make_question())
    tokenizer = build_tokenizer(family, None)
    special = {*tokenizer.all_special_ids}
    for before, after in pairwise(windows):
        assert before.offsets[-16:] == after.offsets[:16]
    assert windows[0].offsets[0][0] == 0
    assert windows[-1].offsets[-1][1] >= len(CONTEXT.rstrip())
    for window in windows:
        context = window.input_ids[window.context_start :][: len(window.offsets)]
        assert not special.intersection(context)


def test_get_span():
    offsets = ((0, 3), (3, 7), (8, 9))
    assert get_span(offsets, 4, 7) == (1, 1)  # the token covers the space before its word
    assert get_span(offsets, 0, 9) == (0, 2)
    assert get_span(offsets, 8, 10) is None
    assert get_span(((5, 9),), 2, 7) is None


def test_missing_answer_points_to_first_token():
    for window in encode("bert", Question(CONTEXT, "Why?", (), 0)):
        assert window.labels == (0, 0)


def test_too_long_questions_raise_or_are_dropped():
    long = Question(CONTEXT, "What " * 30, (), 4)
    with pytest.raises(InputError) as error:
        encode("bert", long)
    assert "1 of 1 questions leave no room for their context in windows of 60 tokens" in str(
        error.value
    )
    assert "(x.jsonl:5)" in str(error.value)
    tokenizer = build_tokenizer("bert", None)
    rows, dropped = encode_questions(
        tokenizer, [long, make_question()], length=60, stride=16, separator="", where=str, drop=True
    )
    assert dropped == 1
    assert {row.row for row in rows} == {0}


def test_context_without_tokens_raises():
    with pytest.raises(InputError, match=r"row 1 has a context without tokens\. Remove the row\."):
        encode("bert", Question("\u200b", "What?", (), 0))
