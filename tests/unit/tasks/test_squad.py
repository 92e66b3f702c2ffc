from __future__ import annotations

import pytest
import torch

from ftlevel.data.encoding.spans import Window
from ftlevel.tasks.span import (
    BestSpan,
    exact_match,
    f1,
    merge_spans,
    normalize_answer,
    update_span,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat, sat!", "cat sat"),
        ("an  apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("theory", "theory"),
        ("The", ""),
    ],
)
def test_normalization(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


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
def test_scores(prediction: str, answers: list[str], em: float, overlap: float) -> None:
    assert exact_match(prediction, answers) == em
    assert f1(prediction, answers) == pytest.approx(overlap)


def window(offsets: tuple[tuple[int, int], ...], size: int) -> Window:
    return Window([0] * size, (0, 0), 0, {}, "ab cd ef gh", (), 2, offsets)


def logits(starts: list[float], ends: list[float]) -> torch.Tensor:
    return torch.tensor([starts, ends]).T


def test_best_span_over_windows() -> None:
    first = window(((0, 2), (3, 5)), 5)  # special, question, "ab", "cd", special
    second = window(((3, 5), (6, 8), (9, 11)), 6)
    found = BestSpan()
    # The best start comes after the best end, and outside the context scores are higher still.
    update_span(found, logits([1, 9, 0, 3, 9], [2, 9, 2, 1, 9]), first)
    assert (found.text, found.score, found.null) == ("cd", 4.0, 3.0)
    update_span(found, logits([4, 0, 0, 3, 0, 0], [4, 0, 0, 0, 2, 0]), second)
    assert (found.text, found.score, found.null) == ("ef gh", 5.0, 3.0)
    assert found.answer(unanswerable=True) == "ef gh"
    update_span(found, logits([0, 0, 0, 0, 0, 0], [-9, 0, 0, 0, 0, 0]), second)
    assert found.null == -9.0
    found.null = 6.0
    assert found.answer(unanswerable=True) == ""
    assert found.answer(unanswerable=False) == "ef gh"


def test_windows_of_a_question_are_merged() -> None:
    found = BestSpan(score=1.0, text="ab", start=0, end=2, null=-2.0)
    merge_spans(found, BestSpan(score=3.0, text="cd", start=3, end=5, null=4.0))
    assert found == BestSpan(score=3.0, text="cd", start=3, end=5, null=-2.0)
    merge_spans(found, BestSpan(score=2.0, text="ef", start=6, end=8, null=-5.0))
    assert found == BestSpan(score=3.0, text="cd", start=3, end=5, null=-5.0)


def test_spans_are_of_at_most_thirty_tokens() -> None:
    offsets = tuple((i, i + 1) for i in range(40))
    long = Window([0] * 41, (0, 0), 0, {}, "x" * 40, (), 1, offsets)
    scores = torch.zeros(41, 2)
    scores[1, 0], scores[40, 1], scores[30, 1] = 5.0, 5.0, 1.0
    found = BestSpan()
    update_span(found, scores, long)
    assert (len(found.text), found.score) == (30, 6.0)
