"""Checks that compare prompts with answers."""

from __future__ import annotations

import random

from ftlevel.data.formats.examples import LabeledText, SourceTarget
from ftlevel.data.gate.checks import TextCheckContext
from ftlevel.data.gate.gate import get_conflicts, get_majority_target, get_swapped
from ftlevel.data.gate.similarity import Digests


def make_digests(examples: list[SourceTarget] | list[LabeledText]) -> Digests:
    return Digests.of(examples, TextCheckContext())


def test_conflicting_answers():
    rows = [("a b", "x"), ("A  b", "y"), ("a b", "X"), ("c", "x")]
    digests = make_digests([SourceTarget(*row, i) for i, row in enumerate(rows)])
    assert [side.tolist() for side in get_conflicts(digests)] == [[1], [0]]
    rows = [("a", None, "x"), ("a", "b", "y"), ("a", None, "y")]
    digests = make_digests([LabeledText(*row, i) for i, row in enumerate(rows)])
    assert get_conflicts(digests)[0].tolist() == [2]


def test_majority_answer():
    rows = [SourceTarget(f"q {i}", "Yes." if i else "No.", i) for i in range(40)]
    assert get_majority_target(make_digests(rows)).tolist() == list(range(1, 40))
    rows[7] = SourceTarget("q", "Never.", 7)
    assert len(get_majority_target(make_digests([*rows[:10], *rows[1:9]]))) == 0
    assert len(get_majority_target(make_digests(rows[:3]))) == 0


QUESTIONS = "what how why tell me about explain the difference between please".split()
ANSWERS = "it is an because usually means that one can be returned by calling which".split()
TOPICS = [f"topic{chr(97 + i)}{chr(97 + k)}" for i in range(8) for k in range(8)]


def make_pairs(count: int) -> list[SourceTarget]:
    generator = random.Random(3)
    rows = []
    for i in range(count):
        topics = generator.choices(TOPICS, k=3)
        question = " ".join([*generator.sample(QUESTIONS, 6), *topics])
        rows.append(SourceTarget(question, " ".join([*generator.sample(ANSWERS, 7), *topics]), i))
    return rows


def test_swapped_prompts_and_answers():
    rows = make_pairs(300)
    assert get_swapped(make_digests(rows)).tolist() == []
    swapped = list(range(5, 300, 20))
    for i in swapped:
        rows[i] = SourceTarget(rows[i].target, rows[i].source, i)
    assert get_swapped(make_digests(rows)).tolist() == swapped


def test_pairs_with_shared_vocabulary_are_not_swapped():
    generator = random.Random(4)
    texts = [" ".join(generator.choices(TOPICS, k=6)) for _ in range(600)]
    rows = [SourceTarget(texts[i], texts[300 + i], i) for i in range(300)]
    assert get_swapped(make_digests(rows)).tolist() == []
