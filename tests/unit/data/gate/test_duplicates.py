"""Exact duplicates are found by hashes of the texts."""

from __future__ import annotations

from typing import Any

import numpy as np

from ftlevel.data.formats.examples import LabeledText, PlainText, SourceTarget
from ftlevel.data.gate import gate, similarity
from ftlevel.data.gate.checks import TextCheckContext
from ftlevel.data.gate.gate import get_common_keys, get_repeated_keys
from ftlevel.data.gate.similarity import Digests


def example_keys(examples: list[Any]) -> Any:
    return Digests.of(examples, TextCheckContext()).keys


def test_exact_duplicates_ignore_case_and_white_space():
    keys = example_keys([PlainText(t, i) for i, t in enumerate(["A b", "a\n B ", "a c", "A b"])])
    repeated, first = get_repeated_keys(keys)
    assert repeated.tolist() == [1, 3]
    assert first.tolist() == [0, 0]


def test_keys_depend_on_answer_and_field_boundary():
    pairs = [SourceTarget("a", "b c", 0), SourceTarget("a b", "c", 1)]
    classes = [LabeledText("a", None, "x", 2), LabeledText("a", None, "y", 3)]
    assert len(set(example_keys([*pairs, *classes]).tolist())) == 4


def test_partitioned_search_matches_search_in_memory(monkeypatch):
    keys = np.random.default_rng(1).integers(0, 2_000, 5_000).astype(np.uint64)
    repeated = [side.tolist() for side in get_repeated_keys(keys)]
    assert len(repeated[0]) > 1_000
    known = np.arange(0, 2_000, 3, dtype=np.uint64)
    monkeypatch.setattr(similarity, "PART_KEYS", 100)
    monkeypatch.setattr(gate, "PART_KEYS", 100)
    assert [side.tolist() for side in get_repeated_keys(keys)] == repeated
    assert get_common_keys(keys, known).tolist() == np.flatnonzero(keys % 3 == 0).tolist()
