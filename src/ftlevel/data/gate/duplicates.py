"""Rows that are there twice: equal but for case and white space, or nearly equal.

Near duplicates are found by MinHash with banding (Broder, 1997; Leskovec, Rajaraman and Ullman,
Mining of Massive Datasets, section 3.4) over token 5-grams: 6 bands of 4 minima each. Rows that
agree in a band are candidates, with probability 1 − (1 − J⁴)⁶ for a Jaccard similarity J (0.96 at
0.8, 0.998 at 0.9). A candidate is compared in full with the first row of its bucket, and with no
other, so that time and memory stay linear in the tokens whatever the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlevel.data.encode import Encoded
from ftlevel.data.examples import Conversation, Labelled, Pair, PlainText, Question, Tagged
from ftlevel.data.gate.flat import Integers, Mask, Ragged, flat_batches

SIMILARITY = 0.8
_GRAM, _BANDS, _DEPTH = 5, 6, 4
Hashes = NDArray[np.uint32]


def example_keys(examples: Iterable[Any]) -> NDArray[np.uint64]:
    """Return 64 bits of each example's text without regard to case and white space."""
    digests = b"".join(
        blake2b(" ".join(_text(e).casefold().split()).encode(), digest_size=8).digest()
        for e in examples
    )
    return np.frombuffer(digests, dtype=np.uint64)


def _text(example: Any) -> str:
    match example:
        case Conversation():
            return "\0".join(f"{m.role}\0{m.content}" for m in example.messages)
        case PlainText():
            return example.text
        case Pair():
            return f"{example.source}\0{example.target}"
        case Labelled():
            return f"{example.text}\0{example.text_pair}\0{example.label}"
        case Tagged():
            return "\0".join((*example.tokens, *map(str, example.tags)))
        case Question():
            return f"{example.question}\0{example.context}\0{example.answers}"
    raise TypeError(f"{type(example).__name__} is no example")


def find_repeated(keys: NDArray[Any]) -> tuple[Integers, Integers]:
    """Return the indices of keys that stood before, and for each the index of the first."""
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    original = first[group]
    again = np.flatnonzero(original != np.arange(len(keys)))
    return again, original[again]


def find_near(rows: Sequence[Encoded], skip: Mask) -> tuple[Integers, Integers]:
    """Return the rows that are nearly an earlier one, and for each which.

    What all rows begin with, such as a system prompt, is left out of the comparison.

    Args:
        rows: of a split.
        skip: which of them to leave out, being known duplicates.
    """
    prefix = _common_prefix(rows)
    parts, wanted, at = [np.zeros((0, _BANDS), dtype=np.uint32)], [], 0
    for flat in flat_batches(rows):
        chosen = flat.ids.lengths - prefix >= _GRAM
        chosen &= ~skip[at : at + len(chosen)]
        parts.append(_band_keys(flat.ids, prefix, chosen))
        wanted.append(at + np.flatnonzero(chosen))
        at += len(chosen)
    keys, numbers = np.concatenate(parts), np.concatenate([*wanted, np.zeros(0, dtype=np.int64)])
    found: dict[int, int] = {}
    for band in keys.T:
        again, first = find_repeated(band)
        for row, other in zip(numbers[again].tolist(), numbers[first].tolist(), strict=True):
            if row not in found and _are_near(rows[row], rows[other], prefix):
                found[row] = other
    ordered = sorted(found)
    return np.array(ordered, dtype=np.int64), np.array([found[r] for r in ordered], dtype=np.int64)


def _common_prefix(rows: Sequence[Encoded]) -> int:
    """Return how many tokens all rows begin with alike; 0 for a single row."""
    if len(rows) < 2:
        return 0
    first = rows[0].input_ids
    prefix = len(first)
    for flat in flat_batches(rows):
        prefix = min(prefix, int(flat.ids.lengths.min()))
        for at in range(prefix):
            if (flat.ids.values[flat.ids.starts[:-1] + at] != first[at]).any():
                prefix = at
                break
    return prefix


def _band_keys(ids: Ragged, prefix: int, wanted: Mask) -> Hashes:
    """Return the keys `(rows, bands)` of the rows in `wanted`."""
    generator = np.random.default_rng(0)
    factors = generator.integers(2**31, 2**32, _BANDS * _DEPTH, dtype=np.uint32) | np.uint32(1)
    offsets = generator.integers(0, 2**32, _BANDS * _DEPTH, dtype=np.uint32)
    grams, starts = _grams(ids, prefix, wanted)
    keys = np.zeros((len(starts), _BANDS), dtype=np.uint32)
    for number, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
        if len(starts):
            least = np.minimum.reduceat(grams * factor + offset, starts)
            keys[:, number // _DEPTH] = _mix(keys[:, number // _DEPTH] * np.uint32(31) + least)
    return keys


def _grams(ids: Ragged, prefix: int, wanted: Mask) -> tuple[Hashes, Integers]:
    """Return a hash of each token 5-gram of the rows in `wanted`, and where each row's begin.

    Args:
        ids: of all rows.
        prefix: tokens to leave out at the beginning of each.
        wanted: which rows.
    """
    values, starts, lengths = ids.values, ids.starts, ids.lengths
    tokens = _mix(np.concatenate((values, np.zeros(_GRAM, dtype=np.int32))).astype(np.uint32))
    grams = np.zeros(len(values), dtype=np.uint32)
    for k in range(_GRAM):
        grams = grams * np.uint32(0x01000193) + tokens[k : k + len(values)]
    inside = np.arange(len(values)) - np.repeat(starts[:-1], lengths)
    left = np.repeat(lengths, lengths) - inside
    keep = np.repeat(wanted, lengths) & (inside >= prefix) & (left >= _GRAM)
    counts = lengths[wanted] - prefix - _GRAM + 1
    return _mix(grams[keep]), np.cumsum(counts) - counts


def _mix(values: Hashes) -> Hashes:
    """Return a bijective scramble of 32 bits (the finalizer of MurmurHash3)."""
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))


def _are_near(row: Encoded, other: Encoded, prefix: int) -> bool:
    """Tell whether the Jaccard similarity of the 5-grams of two examples is high enough."""
    lengths = sorted(len(r.input_ids) - prefix for r in (row, other))
    if row.row == other.row or lengths[0] < SIMILARITY * lengths[1] - _GRAM:
        return False
    sets = []
    for tokens in (row.input_ids[prefix:], other.input_ids[prefix:]):
        sets.append(set(zip(*(tokens[k:] for k in range(_GRAM)), strict=False)))
    return len(sets[0] & sets[1]) >= SIMILARITY * len(sets[0] | sets[1])
