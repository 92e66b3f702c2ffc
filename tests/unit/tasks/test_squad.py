from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftlevel.data.encoding.spans import Window
from ftlevel.data.formats.examples import Question
from ftlevel.errors import UnansweredError
from ftlevel.tasks import TASKS
from ftlevel.tasks.base import OutputOptions
from ftlevel.tasks.span import (
    BestSpan,
    exact_match,
    f1,
    merge_spans,
    normalize_answer,
    update_span,
)
from tiny_tokenizers import build_tokenizer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat, sat!", "cat sat"),
        ("an  apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("theory", "theory"),
        ("The", ""),
    ],
)
def test_normalize_answer(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "overlap"),
    [
        ("the Denver Broncos", ["Denver Broncos"], 1.0, 1.0),
        ("Denver", ["Denver Broncos"], 0.0, 2 / 3),
        ("Denver Denver", ["Denver Broncos"], 0.0, 1 / 2),
        ("x", ["a b", "x y z"], 0.0, 1 / 2),
        ("gold", ["silver"], 0.0, 0.0),
        ("", [], 1.0, 1.0),
        ("something", [], 0.0, 0.0),
        ("", ["something"], 0.0, 0.0),
    ],
)
def test_exact_match_and_f1(prediction, answers, em, overlap):
    assert exact_match(prediction, answers) == em
    assert f1(prediction, answers) == pytest.approx(overlap)


def build_window(offsets: tuple[tuple[int, int], ...], size: int) -> Window:
    return Window([0] * size, (0, 0), 0, {}, "ab cd ef gh", (), 2, offsets)


def build_logits(starts: list[float], ends: list[float]) -> torch.Tensor:
    return torch.tensor([starts, ends]).T


def test_only_a_question_whose_context_has_no_tokens_is_refused():
    model: Any = SimpleNamespace(
        tokenizer=build_tokenizer("bert"), kind="encoder", max_length=0, options={"doc_stride": 4}
    )
    questions = [Question(text, "the value", (), i) for i, text in enumerate(("ab", "\u200b"))]
    with pytest.raises(UnansweredError) as caught:
        TASKS["question-answering"].predict(model, questions, OutputOptions())
    assert caught.value.reasons == {1: "has a context without tokens. Remove the row"}


def test_best_span_over_several_windows():
    first = build_window(((0, 2), (3, 5)), 5)  # special, question, "ab", "cd", special
    second = build_window(((3, 5), (6, 8), (9, 11)), 6)
    best = BestSpan()
    # The best start is after the best end, and logits outside the context are higher still.
    update_span(best, build_logits([1, 9, 0, 3, 9], [2, 9, 2, 1, 9]), first)
    assert (best.text, best.score, best.null) == ("cd", 4.0, 3.0)
    update_span(best, build_logits([4, 0, 0, 3, 0, 0], [4, 0, 0, 0, 2, 0]), second)
    assert (best.text, best.score, best.null) == ("ef gh", 5.0, 3.0)
    assert best.answer(unanswerable=True) == "ef gh"
    update_span(best, build_logits([0, 0, 0, 0, 0, 0], [-9, 0, 0, 0, 0, 0]), second)
    assert best.null == -9.0
    best.null = 6.0
    assert best.answer(unanswerable=True) == ""
    assert best.answer(unanswerable=False) == "ef gh"


def test_merge_spans_keeps_best_span_and_lowest_null_score():
    best = BestSpan(score=1.0, text="ab", start=0, end=2, null=-2.0)
    merge_spans(best, BestSpan(score=3.0, text="cd", start=3, end=5, null=4.0))
    assert best == BestSpan(score=3.0, text="cd", start=3, end=5, null=-2.0)
    merge_spans(best, BestSpan(score=2.0, text="ef", start=6, end=8, null=-5.0))
    assert best == BestSpan(score=3.0, text="cd", start=3, end=5, null=-5.0)


def test_span_has_at_most_thirty_tokens():
    offsets = tuple((i, i + 1) for i in range(40))
    long = Window([0] * 41, (0, 0), 0, {}, "x" * 40, (), 1, offsets)
    span_logits = torch.zeros(41, 2)
    span_logits[1, 0], span_logits[40, 1], span_logits[30, 1] = 5.0, 5.0, 1.0
    best = BestSpan()
    update_span(best, span_logits, long)
    assert (len(best.text), best.score) == (30, 6.0)
