"""Rows that are there twice: equal but for case and white space, or nearly equal.

Near duplicates are found by MinHash with banding (Broder, 1997; Leskovec, Rajaraman and Ullman,
Mining of Massive Datasets, section 3.4) over token 5-grams: 6 bands of 4 minima each. Rows that
agree in a band are candidates, with probability 1 − (1 − J⁴)⁶ for a Jaccard similarity J (0.96 at
0.8, 0.998 at 0.9). A candidate is compared in full with the first row of its bucket, and with no
other, so that time and memory stay linear in the tokens whatever the data.
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
from ftlevel.data.encoding.store import RowStore, lengths_of
from ftlevel.data.gate.flat import Integers, Mask, Ragged, flat_batches
from ftlevel.data.gate.similarity import GRAM, Hashes, find_similar, hash_grams, mix

_BANDS, _DEPTH = 6, 4
_PART = 1 << 17  # keys that are sorted together
_MOST_PARTS = 64  # of more keys each part is larger, as each costs a look at all of them
_NONE = np.zeros(0, dtype=np.int64)


def find_repeated(keys: NDArray[Any]) -> tuple[Integers, Integers]:
    """Return the indices of keys that stood before, and for each the index of the first."""
    parts = list(_repeated(keys, None))
    again, first = (np.concatenate(side) for side in zip((_NONE, _NONE), *parts, strict=True))
    order = np.argsort(again)
    return again[order], first[order]


def find_members(keys: NDArray[Any], known: NDArray[Any]) -> Integers:
    """Return the indices of `keys` that are among `known`, which may be on disk."""
    found = np.zeros(len(keys), dtype=bool)
    for begin in range(0, len(known), _PART):
        found |= np.isin(keys, known[begin : begin + _PART])
    return np.flatnonzero(found)


def _repeated(keys: NDArray[Any], wanted: Mask | None) -> Iterator[tuple[Integers, Integers]]:
    """Yield what `find_repeated` returns in parts, of the keys that are `wanted`; None for all.

    A part has all keys of one remainder, so that equal ones are together, and is small: what is
    taken does not grow with the number of keys.
    """
    count = -(-len(keys) // max(_PART, len(keys) // _MOST_PARTS))
    for remainder in range(count):
        members = []
        for begin in range(0, len(keys), _PART):
            mask = keys[begin : begin + _PART] % count == remainder
            if wanted is not None:
                mask &= wanted[begin : begin + _PART]
            members.append(begin + np.flatnonzero(mask))
        chosen = np.concatenate(members)
        _, first, group = np.unique(keys[chosen], return_index=True, return_inverse=True)
        original = first[group]
        again = np.flatnonzero(original != np.arange(len(chosen)))
        yield chosen[again], chosen[original[again]]


def find_near(rows: Sequence[Encoded], skip: Mask) -> tuple[Integers, Integers]:
    """Return the rows that are nearly an earlier one, and for each which.

    What all rows begin with, such as a system prompt, is left out of the comparison.

    Args:
        rows: of a split.
        skip: which of them to leave out, being known duplicates.
    """
    prefix, lengths = _common_prefix(rows), lengths_of(rows)
    left = ~skip  # the rows that may still be found
    found, originals = [_NONE], [_NONE]
    with _array_on_disk(rows, (_BANDS, len(rows))) as keys:
        begin = 0
        for flat in flat_batches(rows):
            chosen = flat.ids.lengths - prefix >= GRAM
            chosen &= left[begin : begin + len(chosen)]
            left[begin : begin + len(chosen)] = chosen
            keys[:, begin + np.flatnonzero(chosen)] = _band_keys(flat.ids, prefix, chosen).T
            begin += len(chosen)
        wanted = left.copy()
        for band in keys:
            for again, first in _repeated(band, wanted):
                open_ = left[again]
                again, first = again[open_], first[open_]
                near = find_similar(rows, lengths, again, first, prefix)
                left[again[near]] = False
                found.append(again[near])
                originals.append(first[near])
    all_found = np.concatenate(found)
    order = np.argsort(all_found)
    return all_found[order], np.concatenate(originals)[order]


@contextmanager
def _array_on_disk(rows: Sequence[Encoded], shape: tuple[int, ...]) -> Iterator[Hashes]:
    """Give an array of zeros, in a file beside rows that are in a file."""
    if not isinstance(rows, RowStore) or not len(rows):
        yield np.zeros(shape, dtype=np.uint32)
        return
    with tempfile.TemporaryFile(dir=rows.path.parent) as file:
        # On a full disk a write to the mapping would kill the process; this raises.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * 4)
        yield np.memmap(file, np.uint32, "w+", shape=shape)


def _common_prefix(rows: Sequence[Encoded]) -> int:
    """Return how many tokens all rows begin with alike; 0 for a single row."""
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


def _band_keys(ids: Ragged, prefix: int, wanted: Mask) -> Hashes:
    """Return the keys `(rows, bands)` of the rows in `wanted`."""
    generator = np.random.default_rng(0)
    factors = generator.integers(2**31, 2**32, _BANDS * _DEPTH, dtype=np.uint32) | np.uint32(1)
    offsets = generator.integers(0, 2**32, _BANDS * _DEPTH, dtype=np.uint32)
    grams, starts, _ = hash_grams(ids, prefix, wanted)
    keys = np.zeros((len(starts), _BANDS), dtype=np.uint32)
    for number, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
        if len(starts):
            least = np.minimum.reduceat(grams * factor + offset, starts)
            keys[:, number // _DEPTH] = mix(keys[:, number // _DEPTH] * np.uint32(31) + least)
    return keys
