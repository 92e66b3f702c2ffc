"""Exact and near duplicates are found, without false positives and in linear time."""

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


def encode_rows(rows: list[list[int]]) -> list[Encoded]:
    return [Encoded(ids, ids, i) for i, ids in enumerate(rows)]


def get_near_pairs(rows: list[list[int]]) -> list[tuple[int, int]]:
    duplicates_found, first = get_near_duplicates(
        encode_rows(rows), np.zeros(len(rows), dtype=bool)
    )
    return list(zip(duplicates_found.tolist(), first.tolist(), strict=True))


def random_ids(seed: int, length: int = 60) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1000) for _ in range(length)]


def jaccard(a: list[int], b: list[int]) -> float:
    grams = [{tuple(ids[i : i + 5]) for i in range(len(ids) - 4)} for ids in (a, b)]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_exact_duplicates_ignore_case_and_white_space() -> None:
    keys = example_keys([PlainText(t, i) for i, t in enumerate(["A b", "a\n B ", "a c", "A b"])])
    repeated, first = get_repeated_keys(keys)
    assert repeated.tolist() == [1, 3]
    assert first.tolist() == [0, 0]


def test_keys_depend_on_answer_and_field_boundary() -> None:
    pairs = [
        SourceTarget("a", "b c", 0),
        SourceTarget("a b", "c", 1),
        LabeledText("a", None, "x", 2),
    ]
    assert len(set(example_keys([*pairs, LabeledText("a", None, "y", 3)]).tolist())) == 4


def test_near_duplicates_by_similarity() -> None:
    rows = [random_ids(seed) for seed in range(200)]
    changed = [*rows[3][:30], 1, *rows[3][31:]]
    shorter = rows[5][:-4]
    half = rows[7][:30] + random_ids(1007, 30)
    assert jaccard(rows[3], changed) > SIMILARITY > jaccard(rows[7], half)
    assert get_near_pairs([*rows, changed, shorter, half]) == [(200, 3), (201, 5)]


def test_common_prefix_is_ignored() -> None:
    system = random_ids(1, 500)
    assert get_near_pairs([system + random_ids(seed, 20) for seed in range(2, 30)]) == []


def test_short_rows_are_not_near_duplicates() -> None:
    assert get_near_pairs([[1, 2, 3], [1, 2, 3], [1, 2, 3, 4]]) == []


def test_single_and_no_row() -> None:
    assert get_near_pairs([random_ids(1)]) == []
    assert get_near_pairs([]) == []


def test_known_duplicates_are_skipped() -> None:
    rows = [random_ids(1), random_ids(1), random_ids(2)]
    duplicates_found, _ = get_near_duplicates(encode_rows(rows), np.array([False, True, False]))
    assert duplicates_found.tolist() == []


def test_detection_rate_matches_documented_probability() -> None:
    """The probability 1 − (1 − J⁴)⁶ is 0.96 at J = 0.8: nearly all of 300 pairs are found."""
    rows, expected = [], 0
    for seed in range(300):
        base = random_ids(seed, 105)
        similar = base[:-11] + random_ids(5000 + seed, 1)
        expected += jaccard(base, similar) >= SIMILARITY
        rows += [base, similar]
    found_rows = {row for row, _ in get_near_pairs(rows)}
    assert expected == 300
    assert len(found_rows) > 0.97 * expected


def test_many_equal_rows_are_fast() -> None:
    start = time.perf_counter()
    assert len(get_near_pairs([*[random_ids(1)] * 4000, random_ids(2)])) == 3999
    assert time.perf_counter() - start < 5


def store_rows(folder: Path, rows: list[list[int]]) -> RowStore:
    return write_store(folder / "rows.arrow", rows_to_batches(encode_rows(rows)))


def similar_rows(count: int) -> list[list[int]]:
    """Return rows of which many resemble an earlier row, most close to the threshold."""
    generator = random.Random(0)
    rows: list[list[int]] = [[7, 7, *random_ids(0, 40)]]
    while len(rows) < count:
        row = (
            list(generator.choice(rows[-15:]))
            if generator.random() < 0.8
            else random_ids(len(rows))
        )
        for _ in range(generator.randrange(3)):
            row[generator.randrange(2, len(row))] = generator.randrange(1000)
        rows.append([7, 7, *row[2 : generator.randrange(30, 45)]])
    return rows


def test_is_similar_matches_full_comparison(tmp_path: Path) -> None:
    rows = similar_rows(2_500)
    pairs = np.random.default_rng(0).integers(0, len(rows), (2, 20_000))
    pairs[1, ::2] = np.maximum(0, pairs[0, ::2] - pairs[1, ::2] % 20)
    pairs = pairs[:, pairs[0] != pairs[1]]
    expected = [jaccard(rows[a][2:], rows[b][2:]) >= SIMILARITY for a, b in pairs.T.tolist()]
    assert 100 < sum(expected) < 15_000
    for source in (encode_rows(rows), store_rows(tmp_path, rows)):
        assert is_similar(source, row_lengths(source), pairs[0], pairs[1], 2).tolist() == expected


def test_pieces_of_one_example_are_not_duplicates() -> None:
    rows = [
        Encoded(random_ids(1), [], 0),
        Encoded(random_ids(1), [], 0),
        Encoded(random_ids(2), [], 1),
    ]
    duplicates_found, _ = get_near_duplicates(rows, np.zeros(3, dtype=bool))
    assert duplicates_found.tolist() == []


def test_partitioned_search_matches_search_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = similar_rows(3_000)
    skip = np.arange(len(rows)) % 11 == 0
    expected = [side.tolist() for side in get_near_duplicates(encode_rows(rows), skip)]
    assert len(expected[0]) > 100
    keys = np.random.default_rng(1).integers(0, 2_000, 5_000).astype(np.uint64)
    repeated = [side.tolist() for side in get_repeated_keys(keys)]
    known = np.arange(0, 2_000, 3, dtype=np.uint64)
    monkeypatch.setattr(duplicates, "_PART_KEYS", 100)
    monkeypatch.setattr(similarity, "_TOKENS", 1_000)
    assert [side.tolist() for side in get_repeated_keys(keys)] == repeated
    assert get_common_keys(keys, known).tolist() == np.flatnonzero(keys % 3 == 0).tolist()
    store = store_rows(tmp_path, [random_ids(9), *rows])
    for source in (encode_rows(rows), select_rows(store, np.arange(1, len(store)))):
        assert [side.tolist() for side in get_near_duplicates(source, skip)] == expected
