"""Extractive answers: the best span over the windows of a context, and SQuAD's EM and F1.

Scores follow the official script of SQuAD v1.1 (Rajpurkar et al., 2016), and v2.0 (2018) for
questions without an answer.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MAX_ANSWER_TOKENS = 30
_PUNCTUATION = frozenset(string.punctuation)


@dataclass
class Found:
    """The best answer so far over the windows of one question.

    Attributes:
        text: the best span; "" before any window was seen.
        score: its start logit plus its end logit.
        null: the same of "no answer"; the smallest over the windows, as in the official baseline.
        start, end: the characters of the context that the span is, `[start, end)`.
    """

    text: str = ""
    score: float = -math.inf
    null: float = math.inf
    start: int = 0
    end: int = 0

    def answer(self, *, unanswerable: bool) -> str:
        """Return the text, or "" where `unanswerable` is possible and scores higher."""
        return "" if unanswerable and self.null > self.score else self.text


def update_found(found: Found, scores: torch.Tensor, window: Any) -> None:
    """Take a window into account.

    Args:
        found: of the window's question (mutated).
        scores: start and end logits `(seq, 2)`.
        window: a `Window` of the data room: where its context tokens are, and their characters.
    """
    begin = window.context_start
    count = len(window.offsets)
    start = scores[begin : begin + count, 0].float()
    end = scores[begin : begin + count, 1].float()
    spans = start[:, None] + end[None, :]
    allowed = spans.new_ones(spans.shape).triu().tril(MAX_ANSWER_TOKENS - 1).bool()
    spans = spans.masked_fill(~allowed, -math.inf)
    best = int(spans.argmax())
    first, last = divmod(best, count)
    score = float(spans[first, last])
    if score > found.score:
        found.score = score
        begin, end = window.offsets[first][0], window.offsets[last][1]
        text = window.context[begin:end]
        found.text = text.strip()
        found.start = begin + len(text) - len(text.lstrip())
        found.end = found.start + len(found.text)
    found.null = min(found.null, float(scores[0].float().sum()))


def take_better(found: Found, other: Found) -> None:
    """Take what `other` windows of the question gave into account (`found` is mutated)."""
    if other.score > found.score:
        found.score, found.text = other.score, other.text
        found.start, found.end = other.start, other.end
    found.null = min(found.null, other.null)


def normalize_answer(text: str) -> str:
    """Lower the case; take out punctuation, the articles a, an, the, and surplus white space."""
    text = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the prediction is one of the answers, after normalising; none means ""."""
    return float(any(normalize_answer(prediction) == normalize_answer(a) for a in answers or ("",)))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the best F1 over shared words with one of the answers; none means ""."""
    return max(_f1(prediction, answer) for answer in answers or ("",))


def _f1(prediction: str, answer: str) -> float:
    given, expected = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not given or not expected:
        return float(given == expected)
    shared = sum((Counter(given) & Counter(expected)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(given), shared / len(expected)
    return 2 * precision * recall / (precision + recall)
