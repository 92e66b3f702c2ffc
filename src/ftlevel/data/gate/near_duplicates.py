"""Near duplicates: examples that share 80 % of the words of the prompt, and of the answer.

MinHash with banding finds candidates (Broder, 1997; Leskovec, Rajaraman and Ullman, Mining of
Massive Datasets, section 3.4): 8 bands of 4 minima. Examples of Jaccard similarity J share a band
with probability `1 − (1 − J⁴)⁸`, 0.985 at 0.8. Each candidate is compared exactly, and only with
the first example of its band, so time and memory are linear in the words. Words that nearly all
examples have do not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ftlevel.data.gate.checks import Integers, Mask
from ftlevel.data.gate.similarity import (
    NO_ROWS,
    Digests,
    distinct,
    mix,
    repeated_keys,
    sort_pairs,
    split_by_size,
)

SIMILARITY = 0.8
MIN_WORDS = 5
"""Minimum number of words of a near duplicate."""
_BANDS, _DEPTH = 8, 4
_GROUP_WORDS = 1 << 18  # words processed together
_SAMPLE, _MIN_SAMPLE, _COMMON = 1_000, 20, 0.98  # examples that common words are looked for in
Pairs = tuple[Integers, Integers]


@dataclass(frozen=True)
class WordSets:
    """Words of examples.

    Attributes:
        starts: `(examples + 1,)` offsets of the words of each example.
        common: sorted words, as returned by `words`, that do not count.
    """

    digests: Digests
    starts: Integers
    common: Integers

    @classmethod
    def of(cls, digests: Digests, common: Integers | None = None) -> WordSets:
        """Returns the words of `digests`; `common` words default to those of nearly all."""
        records = digests.records
        starts = np.zeros(len(digests) + 1, dtype=np.int64)
        np.cumsum(records["prompt"].astype(np.int64) + records["answer"], out=starts[1:])
        if common is None:
            size = min(len(digests), _SAMPLE)
            owner, words = cls(digests, starts, NO_ROWS).words(np.arange(size))
            values, counts = np.unique(distinct(owner << 33 | words) & _WORD, return_counts=True)
            common = values[counts >= _COMMON * size] if size >= _MIN_SAMPLE else NO_ROWS
        return cls(digests, starts, common)

    def __len__(self) -> int:
        return len(self.digests)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yields (start, end) of ranges of examples with about `_GROUP_WORDS` words each."""
        start = 0
        while start < len(self):
            end = int(np.searchsorted(self.starts, self.starts[start] + _GROUP_WORDS, "right")) - 1
            end = min(max(end, start + 1), len(self))
            yield start, end
            start = end

    def words(self, at: Integers) -> tuple[Integers, Integers]:
        """Returns for each word of the examples `at` the index in `at`, and the word (33 bits)."""
        lengths = self.starts[at + 1] - self.starts[at]
        owner = np.repeat(np.arange(len(at)), lengths)
        offsets = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        in_answer = offsets >= self.digests.records["prompt"][at][owner]
        hashes = self.digests.words[offsets + self.starts[at][owner]]
        words = in_answer.astype(np.int64) << 32 | hashes
        if not len(self.common):
            return owner, words
        slot = np.minimum(np.searchsorted(self.common, words), len(self.common) - 1)
        counts = self.common[slot] != words
        return owner[counts], words[counts]

    def band_keys(self) -> tuple[NDArray[np.uint32], Integers]:
        """Returns the MinHash keys `(bands, examples)`, and the number of words per example."""
        generator = np.random.default_rng(0)
        factors = generator.integers(2**31, 2**32, _BANDS * _DEPTH, dtype=np.uint32) | np.uint32(1)
        offsets = generator.integers(0, 2**32, _BANDS * _DEPTH, dtype=np.uint32)
        keys = np.zeros((_BANDS, len(self)), dtype=np.uint32)
        sizes = np.zeros(len(self), dtype=np.int64)
        for start, end in self.spans():
            owner, words = self.words(np.arange(start, end))
            if not len(owner):
                continue
            first = np.flatnonzero(np.diff(owner, prepend=-1))
            at = start + owner[first]
            sizes[at] = np.diff(first, append=len(owner))
            hashes = mix((words ^ words >> 25).astype(np.uint32))
            for number, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
                least = np.minimum.reduceat(hashes * factor + offset, first)
                band = keys[number // _DEPTH]
                band[at] = mix(band[at] * np.uint32(31) + least)
        return keys, sizes

    def are_similar(self, at: Integers, others: WordSets, other_at: Integers) -> Mask:
        """Returns whether examples `at[i]` and `other_at[i]` of `others` are near duplicates."""
        result = np.zeros(len(at), dtype=bool)
        sizes = self.starts[at + 1] - self.starts[at]
        for group in split_by_size(np.arange(len(at)), sizes, _GROUP_WORDS):
            pairs = (self.words(at[group]), others.words(other_at[group]))
            one, other = (distinct(owner << 33 | words) for owner, words in pairs)
            shared = one[np.isin(one, other, assume_unique=True)]
            counts = [_count_by_side(words, len(group)) for words in (one, other, shared)]
            result[group] = (counts[2] >= SIMILARITY * (counts[0] + counts[1] - counts[2])).all(0)
        records, other_records = self.digests.records[at], others.digests.records[other_at]
        has_words = (records["answer"] > 0) | (other_records["answer"] > 0)
        same: Mask = result & (has_words | (records["last"] == other_records["last"]))
        return same


_WORD = (1 << 33) - 1


def _count_by_side(words: Integers, num_examples: int) -> Integers:
    """Returns the number of words `(2, examples)` of the prompts and of the answers."""
    counts = np.bincount(words >> 32, minlength=2 * num_examples)
    return counts.reshape(num_examples, 2).T


def match_texts(digests: Digests, skip: Mask) -> Pairs:
    """Returns the indices of near duplicates (not of `skip`), and of the examples they repeat."""
    index = WordSets.of(digests)
    keys, sizes = index.band_keys()
    unmatched = ~skip & (sizes >= MIN_WORDS)
    selected, pairs = unmatched.copy(), list[Pairs]()
    for band in keys:
        for again, first in repeated_keys(band, selected):
            again, first = again[unmatched[again]], first[unmatched[again]]
            matches = index.are_similar(again, index, first)
            unmatched[again[matches]] = False
            pairs.append((again[matches], first[matches]))
    return sort_pairs(pairs)


def match_training_texts(digests: Digests, training: Digests) -> Pairs:
    """Returns the indices of examples that almost repeat one of `training`, and of that one."""
    trained = WordSets.of(training)
    index = WordSets.of(digests, trained.common)
    (keys, sizes), (trained_keys, trained_sizes) = index.band_keys(), trained.band_keys()
    candidates, left = np.flatnonzero(trained_sizes >= MIN_WORDS), sizes >= MIN_WORDS
    pairs: list[Pairs] = []
    for band, trained_band in zip(keys, trained_keys, strict=True):
        known, first = np.unique(trained_band[candidates], return_index=True)
        again = np.flatnonzero(left & np.isin(band, known))
        originals = candidates[first[np.searchsorted(known, band[again])]]
        matches = index.are_similar(again, trained, originals)
        left[again[matches]] = False
        pairs.append((again[matches], originals[matches]))
    return sort_pairs(pairs)
