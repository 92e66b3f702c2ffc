"""What is there twice is found, what is not is not, and the work stays linear."""

from __future__ import annotations

import random
import time

import numpy as np

from ftlevel.data.encode import Encoded
from ftlevel.data.examples import Labelled, Pair, PlainText
from ftlevel.data.gate.duplicates import example_keys, find_near, find_repeated
from ftlevel.data.gate.similarity import SIMILARITY


def encoded(rows: list[list[int]]) -> list[Encoded]:
    return [Encoded(ids, ids, i) for i, ids in enumerate(rows)]


def near(rows: list[list[int]]) -> list[tuple[int, int]]:
    found, first = find_near(encoded(rows), np.zeros(len(rows), dtype=bool))
    return list(zip(found.tolist(), first.tolist(), strict=True))


def text(seed: int, length: int = 60) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1000) for _ in range(length)]


def jaccard(a: list[int], b: list[int]) -> float:
    grams = [{tuple(ids[i : i + 5]) for i in range(len(ids) - 4)} for ids in (a, b)]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_case_and_white_space_make_no_difference() -> None:
    keys = example_keys([PlainText(t, i) for i, t in enumerate(["A b", "a\n B ", "a c", "A b"])])
    again, first = find_repeated(keys)
    assert again.tolist() == [1, 3]
    assert first.tolist() == [0, 0]


def test_the_answer_counts_and_so_does_the_border() -> None:
    pairs = [Pair("a", "b c", 0), Pair("a b", "c", 1), Labelled("a", None, "x", 2)]
    assert len(set(example_keys([*pairs, Labelled("a", None, "y", 3)]).tolist())) == 4


def test_near_duplicates_are_found_and_others_are_not() -> None:
    rows = [text(seed) for seed in range(200)]
    changed = [*rows[3][:30], 1, *rows[3][31:]]
    shorter = rows[5][:-4]
    half = rows[7][:30] + text(1007, 30)
    assert jaccard(rows[3], changed) > SIMILARITY > jaccard(rows[7], half)
    assert near([*rows, changed, shorter, half]) == [(200, 3), (201, 5)]


def test_what_all_rows_begin_with_is_no_likeness() -> None:
    system = text(1, 500)
    assert near([system + text(seed, 20) for seed in range(2, 30)]) == []


def test_short_rows_are_left_to_the_exact_check() -> None:
    assert near([[1, 2, 3], [1, 2, 3], [1, 2, 3, 4]]) == []


def test_one_row_alone_and_none() -> None:
    assert near([text(1)]) == []
    assert near([]) == []


def test_known_duplicates_are_skipped() -> None:
    rows = [text(1), text(1), text(2)]
    found, _ = find_near(encoded(rows), np.array([False, True, False]))
    assert found.tolist() == []


def test_the_chance_of_a_pair_is_the_one_that_is_documented() -> None:
    """1 − (1 − J⁴)⁶ is 0.96 at 0.8: of 300 pairs a little above that, nearly all are found."""
    rows, expected = [], 0
    for seed in range(300):
        base = text(seed, 105)
        other = base[:-11] + text(5000 + seed, 1)
        expected += jaccard(base, other) >= SIMILARITY
        rows += [base, other]
    found = {row for row, _ in near(rows)}
    assert expected == 300
    assert len(found) > 0.97 * expected


def test_many_equal_rows_take_no_quadratic_step() -> None:
    began = time.perf_counter()
    assert len(near([*[text(1)] * 4000, text(2)])) == 3999
    assert time.perf_counter() - began < 5
