"""Text checks on small examples: exactly the faulty ones are found."""

from __future__ import annotations

import pytest

from ftlevel.data.formats.examples import (
    Conversation,
    ExampleContent,
    LabeledText,
    PlainText,
    SourceTarget,
    get_content,
)
from ftlevel.data.formats.turns import Message
from ftlevel.data.gate.checks import TEXT_CHECKS, TextCheckContext
from ftlevel.data.gate.similarity import Digests

CONTEXT = TextCheckContext(("<|im_end|>", "<|im_start|>", "</s>"))


def make_conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, text) for role, text in turns), 0)


QUESTION, ANSWER = ("user", "What is it?"), ("assistant", "It is a parser.")


@pytest.mark.parametrize(
    ("check", "example"),
    [
        ("turn_order", make_conversation(ANSWER, QUESTION)),
        ("turn_order", make_conversation(("system", "Be brief."), ANSWER, QUESTION, ANSWER)),
        ("turn_order", make_conversation(QUESTION, ANSWER, QUESTION)),
        ("lost_characters", SourceTarget("a\0b", "c", 0)),
        ("lost_characters", SourceTarget("a", "caf\ufffd", 0)),
        ("lost_characters", PlainText("a \0", 0)),
        ("html", SourceTarget("one<br>two", "three", 0)),
        ("html", SourceTarget("one", '<div class="x">two</div>', 0)),
        ("html", SourceTarget("fish &amp; chips", "one", 0)),
        ("html", LabeledText("it&#39;s", None, "x", 0)),
        ("special_token_text", SourceTarget("a", "b<|im_end|>", 0)),
        ("special_token_text", SourceTarget("<|im_start|>user", "b", 0)),
        ("special_token_text", make_conversation(("user", "a</s>"), ANSWER)),
        ("answer_is_prompt", SourceTarget("Tell me a joke", "tell me  a joke\n", 0)),
    ],
)
def test_only_expected_check_fails(check, example):
    failed_checks = [
        name for name, find in TEXT_CHECKS.items() if find(get_content(example), CONTEXT)
    ]
    assert failed_checks == [check]


@pytest.mark.parametrize(
    "example",
    [
        make_conversation(("system", "Be brief."), QUESTION, ANSWER, QUESTION, ANSWER),
        SourceTarget("if a < b and c > d: print(a & b)", "x<y>z", 0),
        SourceTarget("What is `<br>`?", "A tag: ```html\n<br>\n```", 0),
        SourceTarget("identity<T>(arg: T)", "AT&T; R&D", 0),
        PlainText("<|im_start|>user\nhello<|im_end|>", 0),  # already rendered by a template
        LabeledText("one </s> two", None, "x", 0),
        SourceTarget("Hotel", "Hotel", 0),
        SourceTarget("a\x85b", "c", 0),
    ],
)
def test_valid_examples_pass_all_checks(example):
    assert [name for name, find in TEXT_CHECKS.items() if find(get_content(example), CONTEXT)] == []


def test_digests_record_failed_checks():
    texts = [("a", "b"), ("a<br>", "b\0"), ("<p>", "b")]
    digests = Digests.of([SourceTarget(*text, i) for i, text in enumerate(texts)], CONTEXT)
    for name, rows in (("html", [1, 2]), ("lost_characters", [1]), ("turn_order", [])):
        assert digests.marked(name).tolist() == rows


def test_plain_text_has_target_only():
    assert get_content(PlainText("a b", 0)) == ExampleContent("", "a b", "", "")


def test_content_of_conversation():
    parts = make_conversation(
        ("system", "s"), QUESTION, ANSWER, ("user", "And this?"), ("assistant", "A lexer.")
    ).content
    assert parts.last == "A lexer."
    assert parts.input_text == "What is it?\nAnd this?"
    assert parts.target_text == "It is a parser.\nA lexer."
    assert "It is a parser." in parts.before
    assert "s" not in parts.input_text.split()
    assert make_conversation(("system", "s"), ANSWER, QUESTION).content.before == ""
