"""What is there twice is found, what is not is not, and the work stays linear."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.store import (
    RowStore,
    row_lengths,
    rows_to_batches,
    select_rows,
    write_store,
)
from ftlevel.data.formats.examples import LabeledText, PlainText, SourceTarget
from ftlevel.data.gate import gate as duplicates
from ftlevel.data.gate import similarity
from ftlevel.data.gate.checks import TextCheckContext
from ftlevel.data.gate.gate import get_common_keys, get_near_duplicates, get_repeated_keys
from ftlevel.data.gate.similarity import SIMILARITY, Digests, is_similar


def example_keys(examples: list[Any]) -> Any:
    return Digests.of(examples, TextCheckContext()).keys


def encoded(rows: list[list[int]]) -> list[Encoded]:
    return [Encoded(ids, ids, i) for i, ids in enumerate(rows)]


def near(rows: list[list[int]]) -> list[tuple[int, int]]:
    found, first = get_near_duplicates(encoded(rows), np.zeros(len(rows), dtype=bool))
    return list(zip(found.tolist(), first.tolist(), strict=True))


def text(seed: int, length: int = 60) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1000) for _ in range(length)]


def jaccard(a: list[int], b: list[int]) -> float:
    grams = [{tuple(ids[i : i + 5]) for i in range(len(ids) - 4)} for ids in (a, b)]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_case_and_white_space_make_no_difference() -> None:
    keys = example_keys([PlainText(t, i) for i, t in enumerate(["A b", "a\n B ", "a c", "A b"])])
    again, first = get_repeated_keys(keys)
    assert again.tolist() == [1, 3]
    assert first.tolist() == [0, 0]


def test_the_answer_counts_and_so_does_the_border() -> None:
    pairs = [
        SourceTarget("a", "b c", 0),
        SourceTarget("a b", "c", 1),
        LabeledText("a", None, "x", 2),
    ]
    assert len(set(example_keys([*pairs, LabeledText("a", None, "y", 3)]).tolist())) == 4


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
    found, _ = get_near_duplicates(encoded(rows), np.array([False, True, False]))
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


def stored(folder: Path, rows: list[list[int]]) -> RowStore:
    return write_store(folder / "rows.arrow", rows_to_batches(encoded(rows)))


def relatives(count: int) -> list[list[int]]:
    """Rows of which many are like an earlier one, most of these near the border."""
    generator = random.Random(0)
    rows: list[list[int]] = [[7, 7, *text(0, 40)]]
    while len(rows) < count:
        row = list(generator.choice(rows[-15:])) if generator.random() < 0.8 else text(len(rows))
        for _ in range(generator.randrange(3)):
            row[generator.randrange(2, len(row))] = generator.randrange(1000)
        rows.append([7, 7, *row[2 : generator.randrange(30, 45)]])
    return rows


def test_hashes_find_the_pairs_that_full_comparison_finds(tmp_path: Path) -> None:
    rows = relatives(2_500)
    pairs = np.random.default_rng(0).integers(0, len(rows), (2, 20_000))
    pairs[1, ::2] = np.maximum(0, pairs[0, ::2] - pairs[1, ::2] % 20)
    pairs = pairs[:, pairs[0] != pairs[1]]
    expected = [jaccard(rows[a][2:], rows[b][2:]) >= SIMILARITY for a, b in pairs.T.tolist()]
    assert 100 < sum(expected) < 15_000
    for some in (encoded(rows), stored(tmp_path, rows)):
        assert is_similar(some, row_lengths(some), pairs[0], pairs[1], 2).tolist() == expected


def test_one_example_is_no_duplicate_of_itself() -> None:
    rows = [Encoded(text(1), [], 0), Encoded(text(1), [], 0), Encoded(text(2), [], 1)]
    found, _ = get_near_duplicates(rows, np.zeros(3, dtype=bool))
    assert found.tolist() == []


def test_parts_on_disk_find_what_is_found_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = relatives(3_000)
    skip = np.arange(len(rows)) % 11 == 0
    whole = [side.tolist() for side in get_near_duplicates(encoded(rows), skip)]
    assert len(whole[0]) > 100
    keys = np.random.default_rng(1).integers(0, 2_000, 5_000).astype(np.uint64)
    repeated = [side.tolist() for side in get_repeated_keys(keys)]
    known = np.arange(0, 2_000, 3, dtype=np.uint64)
    monkeypatch.setattr(duplicates, "_PART_KEYS", 100)
    monkeypatch.setattr(similarity, "_TOKENS", 1_000)
    assert [side.tolist() for side in get_repeated_keys(keys)] == repeated
    assert get_common_keys(keys, known).tolist() == np.flatnonzero(keys % 3 == 0).tolist()
    store = stored(tmp_path, [text(9), *rows])
    for some in (encoded(rows), select_rows(store, np.arange(1, len(store)))):
        assert [side.tolist() for side in get_near_duplicates(some, skip)] == whole
