"""Token 5-grams of rows, and whether two rows have most of them in common (Jaccard similarity)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.gate.flat import Integers, Mask, Ragged, gather

SIMILARITY = 0.8
GRAM = 5  # tokens
_TOKENS = 1 << 16  # of pairs that are looked at together, of which there are fewer than 2^13
Hashes = NDArray[np.uint32]


def hash_grams(
    ids: Ragged, prefix: int, wanted: Mask
) -> tuple[Hashes, Integers, NDArray[np.int32]]:
    """Return a hash of each token 5-gram of some rows, where each row's begin, and first tokens.

    Args:
        ids: of all rows.
        prefix: tokens to leave out at the beginning of each.
        wanted: which rows.
    """
    values, starts, lengths = ids.values, ids.starts, ids.lengths
    tokens = mix(np.concatenate((values, np.zeros(GRAM, dtype=np.int32))).astype(np.uint32))
    grams = np.zeros(len(values), dtype=np.uint32)
    for k in range(GRAM):
        grams = grams * np.uint32(0x01000193) + tokens[k : k + len(values)]
    inside = np.arange(len(values)) - np.repeat(starts[:-1], lengths)
    left = np.repeat(lengths, lengths) - inside
    keep = np.repeat(wanted, lengths) & (inside >= prefix) & (left >= GRAM)
    counts = lengths[wanted] - prefix - GRAM + 1
    return mix(grams[keep]), np.cumsum(counts) - counts, values[keep]


def mix(values: Hashes) -> Hashes:
    """Return a bijective scramble of 32 bits (the finalizer of MurmurHash3)."""
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))


def find_similar(
    rows: Sequence[Encoded], lengths: Integers, these: Integers, those: Integers, prefix: int
) -> Mask:
    """Tell for each pair of rows whether they are nearly the same, and of two examples.

    Most pairs are told apart by hashes, many at a time; what these leave is compared in full.

    Args:
        rows: of a split.
        lengths: of all rows, in tokens.
        these: one row of each pair, with a 5-gram at least.
        those: the other.
        prefix: tokens to leave out at the beginning of each.
    """
    found = np.zeros(len(these), dtype=bool)
    sizes = np.stack((lengths[these], lengths[those]))
    alike = _are_alike(sizes.min(axis=0) - prefix, sizes.max(axis=0) - prefix)
    possible = np.flatnonzero(alike)
    until = np.cumsum(sizes.sum(axis=0, dtype=np.int64)[possible])
    borders = np.flatnonzero(np.diff(until // _TOKENS)) + 1
    for some in np.split(possible, borders):
        likely = some[_may_be_near(rows, these[some], those[some], prefix)]
        for i in likely.tolist():
            found[i] = _are_near(rows[int(these[i])], rows[int(those[i])], prefix)
    return found


def _are_alike(shorter: Any, longer: Any) -> Any:
    """Tell whether rows of these lengths in tokens can have enough in common."""
    return shorter >= SIMILARITY * longer - GRAM


def _may_be_near(rows: Sequence[Encoded], these: Integers, those: Integers, prefix: int) -> Mask:
    """Tell for each pair of rows whether they are near by 49 bits of each of their 5-grams.

    Two grams of a pair have these bits in common by chance once in 10^12 pairs of short rows.
    """
    count = len(these)
    ids = gather(rows, np.concatenate((these, those)))
    grams, starts, first = hash_grams(ids, prefix, np.ones(2 * count, dtype=bool))
    each = np.diff(starts, append=len(grams))
    pair = np.repeat(np.tile(np.arange(count), 2), each)
    side = np.repeat(np.repeat((0, 1), count), each)
    gram = (first.astype(np.int64) & 0x1FFFF) << 32 | grams
    keys = np.sort(pair << 50 | gram << 1 | side)
    keys = keys[np.diff(keys, prepend=-1) != 0]  # the grams of each side, once
    pair, gram = keys >> 50, keys >> 1
    common = np.bincount(pair[1:][gram[1:] == gram[:-1]], minlength=count)
    likely: Mask = common >= SIMILARITY * (np.bincount(pair, minlength=count) - common)
    return likely


def _are_near(row: Encoded, other: Encoded, prefix: int) -> bool:
    """Tell whether the Jaccard similarity of the 5-grams of two examples is high enough."""
    lengths = sorted(len(r.input_ids) - prefix for r in (row, other))
    if row.row == other.row or not _are_alike(*lengths):
        return False
    sets = []
    for tokens in (row.input_ids[prefix:], other.input_ids[prefix:]):
        sets.append(set(zip(*(tokens[k:] for k in range(GRAM)), strict=False)))
    return len(sets[0] & sets[1]) >= SIMILARITY * len(sets[0] | sets[1])
