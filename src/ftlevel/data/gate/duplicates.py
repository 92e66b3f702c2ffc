"""Find duplicate rows, conflicting answers and swapped roles.

Exact duplicates are equal up to case and white space. Near duplicates use MinHash with banding
(Broder, 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4) on token
5-grams: 6 bands of 4 minima. Rows of Jaccard similarity J share a band with probability
`1 − (1 − J⁴)⁶` (0.96 at 0.8, 0.998 at 0.9). Each candidate is compared only with the first row of
its bucket, so time and memory are linear in the tokens.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.store import RowStore, row_lengths
from ftlevel.data.gate.checks import Integers, Mask, Ragged, flat_batches
from ftlevel.data.gate.similarity import (
    GRAM,
    Digests,
    Hashes,
    distinct,
    find_similar,
    hash_grams,
    mix,
    partition_keys,
)
from ftlevel.data.gate.wordings import WordIndex

_BANDS, _DEPTH = 6, 4
_PART_KEYS = 1 << 17  # keys sorted together
_MAX_PARTS = 64  # limit: each part scans all keys
_NONE = np.zeros(0, dtype=np.int64)


def find_repeated(keys: NDArray[Any], selected: Mask | None = None) -> tuple[Integers, Integers]:
    """Find the indices of repeated keys, and the index of the first occurrence of each.

    `selected` masks the keys to compare; None compares all.
    """
    parts = list(_repeated(keys, selected))
    again, first = (np.concatenate(side) for side in zip((_NONE, _NONE), *parts, strict=True))
    order = np.argsort(again)
    return again[order], first[order]


def find_members(keys: NDArray[Any], others: NDArray[Any]) -> Integers:
    """Find the indices of `keys` that occur in `others`, which may be on disk."""
    mask = np.zeros(len(keys), dtype=bool)
    for start in range(0, len(others), _PART_KEYS):
        mask |= np.isin(keys, others[start : start + _PART_KEYS])
    return np.flatnonzero(mask)


def _repeated(keys: NDArray[Any], selected: Mask | None) -> Iterator[tuple[Integers, Integers]]:
    count = -(-len(keys) // max(_PART_KEYS, len(keys) // _MAX_PARTS))
    for part in partition_keys(keys, selected, _PART_KEYS, count):
        _, first, group = np.unique(keys[part], return_index=True, return_inverse=True)
        original = first[group]
        again = np.flatnonzero(original != np.arange(len(part)))
        yield part[again], part[original[again]]


def find_near_duplicates(rows: Sequence[Encoded], skip: Mask) -> tuple[Integers, Integers]:
    """Find near duplicates of earlier rows, and the earlier row of each.

    A prefix common to all rows, such as a system prompt, is ignored. `skip` marks known duplicates.
    """
    prefix, lengths = _common_prefix(rows), row_lengths(rows)
    selected = ~skip
    duplicates, originals = [_NONE], [_NONE]
    with _array_on_disk(rows, (_BANDS, len(rows))) as keys:
        start = 0
        for flat in flat_batches(rows):
            mask = selected[start : start + len(flat.ids)]
            mask &= flat.ids.lengths - prefix >= GRAM
            keys[:, start + np.flatnonzero(mask)] = _band_keys(flat.ids, prefix, mask).T
            start += len(mask)
        unmatched = selected.copy()
        for band in keys:
            for again, first in _repeated(band, selected):
                again, first = again[unmatched[again]], first[unmatched[again]]
                near = find_similar(rows, lengths, again, first, prefix)
                unmatched[again[near]] = False
                duplicates.append(again[near])
                originals.append(first[near])
    again = np.concatenate(duplicates)
    order = np.argsort(again)
    return again[order], np.concatenate(originals)[order]


@contextmanager
def _array_on_disk(rows: Sequence[Encoded], shape: tuple[int, ...]) -> Iterator[Hashes]:
    """Yield an array of zeros; for a `RowStore`, a temporary file next to it."""
    if not isinstance(rows, RowStore) or not len(rows):
        yield np.zeros(shape, dtype=np.uint32)
        return
    with tempfile.TemporaryFile(dir=rows.path.parent) as file:
        # On a full disk a write to the mapping would kill the process; this raises.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * 4)
        yield np.memmap(file, np.uint32, "w+", shape=shape)


def _common_prefix(rows: Sequence[Encoded]) -> int:
    """Return the number of leading tokens shared by all rows; 0 for a single row."""
    if len(rows) < 2:
        return 0
    first = rows[0].input_ids
    prefix = len(first)
    for flat in flat_batches(rows):
        prefix = min(prefix, int(np.min(flat.ids.lengths)))
        for at in range(prefix):
            if (flat.ids.values[flat.ids.starts[:-1] + at] != first[at]).any():
                prefix = at
                break
    return prefix


def _band_keys(ids: Ragged, prefix: int, selected: Mask) -> Hashes:
    """Return MinHash band keys `(rows, bands)` of the `selected` rows."""
    generator = np.random.default_rng(0)
    factors = generator.integers(2**31, 2**32, _BANDS * _DEPTH, dtype=np.uint32) | np.uint32(1)
    offsets = generator.integers(0, 2**32, _BANDS * _DEPTH, dtype=np.uint32)
    grams, starts, _ = hash_grams(ids, prefix, selected)
    keys = np.zeros((len(starts), _BANDS), dtype=np.uint32)
    for number, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
        if len(starts):
            least = np.minimum.reduceat(grams * factor + offset, starts)
            keys[:, number // _DEPTH] = mix(keys[:, number // _DEPTH] * np.uint32(31) + least)
    return keys


ONE_ANSWER_SHARE = 0.95
_MIN_ROWS = 10
_SAMPLE = 1_000
_BUCKETS = 1 << 16
_WORDS = 200  # examined per side
_MIN_MEDIAN = 10.0  # nats
_SWAPPED_SHARE = 0.2


def find_conflicts(digests: Digests) -> tuple[Integers, Integers]:
    """Find examples that repeat a prompt with another answer, and the earlier examples."""
    prompts, answers = digests.records["before"], digests.records["last"]
    again, first = find_repeated(prompts, prompts != 0)
    conflict = answers[again] != answers[first]
    return again[conflict], first[conflict]


def find_one_answer(digests: Digests) -> Integers:
    """Find examples with the most frequent answer, if at least 95 % share it."""
    records = digests.records
    answers = records["last"]
    if len(answers) < _MIN_ROWS or not records["before"].all():
        return _NONE
    values, counts = np.unique(answers[:: -(-len(answers) // _SAMPLE)], return_counts=True)
    same = np.flatnonzero(answers == values[np.argmax(counts)])
    return same if len(same) >= ONE_ANSWER_SHARE * len(answers) else same[:0]


def find_swapped(digests: Digests) -> Integers:
    """Find examples whose prompt and answer appear to be swapped.

    A naive Bayes model compares the words of each row with those of all other prompts and answers.
    It is used only if it separates both sides by a median of 10 nats.
    """
    index = WordIndex.of(digests)
    words = np.zeros((2, _BUCKETS))
    for start, end in index.spans():
        bucket, side, _ = _sides(index, start, end)
        for k in (0, 1):
            words[k] += np.bincount(bucket[side == k], minlength=_BUCKETS)
    score = np.zeros(len(index))
    for start, end in index.spans():
        bucket, side, row = _sides(index, start, end)
        asked = words[0][bucket] - (side == 0)
        answered = words[1][bucket] - (side == 1)
        for_asked = np.log(asked + 0.5) - np.log(answered + 0.5)
        weight = np.where(asked + answered > 0, np.where(side == 0, for_asked, -for_asked), 0)
        score[start:end] = np.bincount(row, weight, minlength=end - start)
    if len(score) < _MIN_ROWS or (median := float(np.median(score))) < _MIN_MEDIAN:
        return _NONE
    return np.flatnonzero((score < -_SWAPPED_SHARE * median) & (digests.records["before"] != 0))


def _sides(index: WordIndex, start: int, end: int) -> tuple[Integers, NDArray[np.int64], Integers]:
    """Return bucket, side (0 prompt, 1 answer) and row (from 0) of distinct words."""
    starts = index.starts[start : end + 1]
    lengths = np.diff(starts)
    row = np.repeat(np.arange(end - start), lengths)
    at = np.arange(len(row)) - np.repeat(starts[:-1] - starts[0], lengths)
    asked = np.repeat(index.digests.records["asked"][start:end].astype(np.int64), lengths)
    side = (at >= asked).astype(np.int64)
    examined = at - side * asked < _WORDS
    words = mix(np.asarray(index.digests.words[starts[0] : starts[-1]])[examined])
    bucket = (words & np.uint32(_BUCKETS - 1)).astype(np.int64)
    packed = distinct((row[examined] * 2 + side[examined]) * _BUCKETS + bucket)
    return packed % _BUCKETS, packed // _BUCKETS % 2, packed // (2 * _BUCKETS)
