"""Near duplicates by words, which also covers short texts.

Candidates share a pair of their four rarest words: two texts that differ in two words have at least
two of these in common (prefix filter of set similarity joins: Chaudhuri, Ganti and Kaushik, 2006;
Bayardo, Ma and Srikant, 2007). Only some candidates are compared in full, so time is linear in the
number of words.

The distance counts half words: a typo counts as one, another word as two. Texts of fewer than eight
words may differ only by a typo. Many pairs are compared at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlevel.data.gate.checks import Integers, Mask
from ftlevel.data.gate.similarity import (
    MAX_WORDS,
    NO_ROWS,
    ONE_CLASS,
    Digests,
    Words,
    distinct,
    mix,
    partition_keys,
    sort_pairs,
    split_by_size,
)

_TYPO, _WORD = 1, 2  # half words
MIN_WORDS = 4
"""Minimum number of words for one typo to be allowed."""
_MIN_WORDS_TO_DIFFER = 8
_MIN_LETTERS = 4  # of a word with a typo
_WORDS_PER_CHANGE = 5  # one word in five may differ
_MAX_DISTANCE = 6  # half words
_WORDS_PER_SIDE = 10  # one word in ten of each side, if both differ
_TOO_FAR = 1 << 20
_BAND = _MAX_DISTANCE // _WORD  # maximum number of missing words
_OFFSETS = np.arange(-_BAND, _BAND + 1)[:, None]
_LETTER_BITS = 0x1FFF
_BITS = np.array([n.bit_count() for n in range(_LETTER_BITS + 1)], dtype=np.uint8)


@dataclass(frozen=True)
class TextBatch:
    """Prompts or answers of several examples: word hashes `(longest, texts)`, and word counts.

    Entries of `words` after the end of a text are undefined.
    """

    words: NDArray[np.uint32]
    sizes: NDArray[np.int64]

    def take(self, at: Any) -> TextBatch:
        """Returns the texts at the indices `at`."""
        return TextBatch(self.words[:, at], self.sizes[at])


Sides = tuple[TextBatch, TextBatch]


def compute_max_distance(lengths: Any) -> Any:
    """Returns the maximum distance, in half words, of near duplicates with `lengths` words."""
    ratio = np.minimum(lengths * _WORD // _WORDS_PER_CHANGE, _MAX_DISTANCE)
    return np.where(
        lengths >= _MIN_WORDS_TO_DIFFER, ratio, np.where(lengths >= MIN_WORDS, _TYPO, 0)
    )


def compute_distances(one: Sides, other: Sides) -> NDArray[np.int64]:
    """Returns the distance of each pair in half words (typo 1, word 2).

    The distance is at least `_TOO_FAR` for pairs that are no near duplicates: both prompt and
    answer differ substantially, or an answer of fewer than four words by more than a typo.
    """
    prompt_distances = compute_edit_distances(one[0], other[0])
    target_distances = np.full(len(prompt_distances), _TOO_FAR, dtype=np.int64)
    matches = np.flatnonzero(prompt_distances <= _MAX_DISTANCE)
    target_distances[matches] = compute_edit_distances(one[1].take(matches), other[1].take(matches))
    prompt_sizes, sizes = (np.minimum(a.sizes, b.sizes) for a, b in zip(one, other, strict=True))
    new_target = (one[0].sizes > 0) & (target_distances > _TYPO) & (sizes < MIN_WORDS)
    both = (
        (prompt_distances > 0)
        & (target_distances > 0)
        & (prompt_distances + target_distances > 2 * _TYPO)
    )
    large = (_WORDS_PER_SIDE * prompt_distances > _WORD * prompt_sizes) | (
        _WORDS_PER_SIDE * target_distances > _WORD * sizes
    )
    return np.where(new_target | (both & large), _TOO_FAR, prompt_distances + target_distances)


def compute_edit_distances(one: TextBatch, other: TextBatch) -> NDArray[np.int64]:
    """Returns the edit distance of each pair in half words; `_TOO_FAR` if it is too large.

    The distance is Damerau-Levenshtein (optimal string alignment) over words, in a band.
    """
    result = np.full(len(one.sizes), _TOO_FAR, dtype=np.int64)
    active = np.flatnonzero(np.abs(one.sizes - other.sizes) <= _BAND)
    # Row k of `b` is word k - _BAND, so rows i - 1 to i + 5 are in the band of word i.
    a, b = one.words, np.pad(other.words, ((_BAND, 0), (0, 0)))
    b = np.pad(b, ((0, max(0, len(a) + 2 * _BAND - len(b))), (0, 0)))
    a, b, sizes, ends = a[:, active], b[:, active], one.sizes[active], other.sizes[active]
    row = _edge(0, ends)
    before = row
    for i in range(len(a) + 1):
        if i:
            earlier, before = before, row
            row = _next_row(i, a, b, before, earlier, ends)
        at = np.flatnonzero(sizes == i)
        result[active[at]] = row[ends[at] - i + _BAND, at]
        going = (sizes > i) & (row.min(axis=0) <= _MAX_DISTANCE)
        if not going.any():
            break
        if 2 * np.count_nonzero(going) < len(going):
            a, b, row, before = a[:, going], b[:, going], row[:, going], before[:, going]
            active, sizes, ends = active[going], sizes[going], ends[going]
    result[result > _MAX_DISTANCE] = _TOO_FAR
    return result


def _edge(i: int, ends: NDArray[np.int64]) -> NDArray[np.int32]:
    """Returns row i of the distance matrix `(band, pairs)`; all but its borders are `_TOO_FAR`."""
    j = i + _OFFSETS
    known = (j >= 0) & (j <= ends) if i == 0 else np.broadcast_to(j == 0, (len(j), len(ends)))
    return np.where(known, (i + j) * _WORD, _TOO_FAR).astype(np.int32)


def _next_row(
    i: int,
    a: NDArray[np.uint32],
    b: NDArray[np.uint32],
    before: NDArray[np.int32],
    earlier: NDArray[np.int32],
    ends: NDArray[np.int64],
) -> NDArray[np.int32]:
    """Returns row i of the distance matrix from rows i − 1 (`before`) and i − 2 (`earlier`)."""
    word, others = a[i - 1], b[i - 1 : i + 2 * _BAND]
    step = np.where(word == others, 0, np.where(is_typo(word, others), _TYPO, _WORD))
    row = before + step.astype(np.int32)
    np.minimum(row[:-1], before[1:] + _WORD, out=row[:-1])
    if i > 1:
        swapped = (word == b[i - 2 : i + 2 * _BAND - 1]) & (a[i - 2] == others)
        swapped &= i + _OFFSETS > 1
        row = np.where(swapped, np.minimum(row, earlier + _WORD), row)
    j = i + _OFFSETS
    row = np.where((j >= 1) & (j <= ends), row, _edge(i, ends))
    offsets = (_WORD * np.arange(len(row), dtype=np.int32))[:, None]  # insertions
    row = np.minimum.accumulate(row - offsets, axis=0) + offsets
    return np.where(j <= ends, row, np.int32(_TOO_FAR))


def is_typo(word: Any, other: Any) -> Any:
    """Returns whether two words (32-bit hashes) differ by a typo: similar letters and no digit."""
    letters = np.maximum(_BITS[word & _LETTER_BITS], _BITS[other & _LETTER_BITS])
    lengths = ((word >> 13) - (other >> 13)) & 3  # difference modulo 4
    differing = _BITS[(word ^ other) & _LETTER_BITS]
    no_digit = (word | other) & 0x8000 == 0
    return no_digit & (letters >= _MIN_LETTERS) & (lengths != 2) & (differing <= 1 + (lengths == 0))


_RAREST = 4
_PAIRS = tuple(combinations(range(_RAREST), 2))
_BUCKETS = 1 << 20
_CHUNK_WORDS = 1 << 20
_GROUP_WORDS = 1 << 16  # words processed together
_BOILERPLATE, _MIN_EXAMPLES = 0.98, 20
_RECENT = 2  # previous candidates to compare, in addition to the first
_LONG_TEXT = 30
Keys = NDArray[np.uint32]


@dataclass(frozen=True)
class WordIndex:
    """Word offsets of examples, and word frequencies in the training set.

    Attributes:
        starts: `(examples + 1,)` offsets of the words of each example.
        counts: word frequencies, by 20 bits of the hash.
        limit: frequency from which a word counts as boilerplate and is ignored.
    """

    digests: Digests
    starts: Integers
    counts: Integers
    limit: float

    @classmethod
    def of(cls, digests: Digests, training: WordIndex | None = None) -> WordIndex:
        """Returns the index of `digests`, with the word frequencies of `training` if given."""
        records = digests.records
        offsets = np.zeros(len(digests) + 1, dtype=np.int64)
        np.cumsum(records["prompt"].astype(np.int64) + records["answer"], out=offsets[1:])
        if training is not None:
            return cls(digests, offsets, training.counts, training.limit)
        hashes = digests.words[: offsets[-1]]
        counts = np.bincount(_bucket(hashes[:_CHUNK_WORDS]), minlength=_BUCKETS)
        for start in range(_CHUNK_WORDS, len(hashes), _CHUNK_WORDS):
            counts += np.bincount(_bucket(hashes[start : start + _CHUNK_WORDS]), minlength=_BUCKETS)
        limit = _BOILERPLATE * len(digests) if len(digests) >= _MIN_EXAMPLES else np.inf
        return cls(digests, offsets, counts, limit)

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def lengths(self) -> Integers:
        """Number of words of each example."""
        return np.diff(self.starts)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yields (start, end) of ranges of examples with about `_GROUP_WORDS` words each."""
        start = 0
        while start < len(self):
            end = int(np.searchsorted(self.starts, self.starts[start] + _GROUP_WORDS, "right")) - 1
            end = min(max(end, start + 1), len(self))
            yield start, end
            start = end

    def sides(self, at: Integers) -> Sides:
        """Returns the prompts and the answers of the examples at the indices `at`."""
        prompt_sizes = self.digests.records["prompt"][at].astype(np.int64)
        begins = self.starts[at]
        target_sizes = self.lengths[at] - prompt_sizes
        return self._texts(begins, prompt_sizes), self._texts(begins + prompt_sizes, target_sizes)

    def _texts(self, begins: Integers, sizes: Integers) -> TextBatch:
        offsets = begins + np.arange(np.max(sizes, initial=0))[:, None]
        hashes = self.digests.words
        return TextBatch(hashes[np.minimum(offsets, len(hashes) - 1)], sizes)

    def gather(self, at: Integers) -> tuple[Words, Integers]:
        """Returns the concatenated words of the examples at indices `at`, and each word count."""
        lengths = self.lengths[at]
        before = np.cumsum(lengths) - lengths
        offsets = np.repeat(self.starts[at] - before, lengths) + np.arange(lengths.sum())
        return self.digests.words[offsets], lengths


def match_texts(digests: Digests, skip: Mask) -> tuple[Integers, Integers]:
    """Returns the indices of near duplicates (not of `skip`), and of the examples they repeat."""
    index = WordIndex.of(digests)
    keys, informative = _all_keys(index, ~skip)
    owners = np.repeat(np.arange(len(index), dtype=np.int32), len(_PAIRS))
    flat, pairs = keys.reshape(-1), [NO_ROWS]
    for group in partition_keys(flat, flat != 0, _CHUNK_WORDS, -(-len(flat) // _CHUNK_WORDS)):
        group = group[np.argsort(flat[group], kind="stable")]
        key, owner = flat[group], owners[group]
        begins = np.flatnonzero(np.diff(key, prepend=key[:1] ^ np.uint32(1)))
        first = np.repeat(owner[begins], np.diff(begins, append=len(key)))
        pairs.append(_pack_pairs(owner, first, len(index)))
        for lag in range(1, _RECENT + 1):
            is_equal = key[lag:] == key[:-lag]
            pairs.append(_pack_pairs(owner[lag:][is_equal], owner[:-lag][is_equal], len(index)))
    return _find_first(index, index, distinct(np.concatenate(pairs)), informative, informative)


def match_training_texts(digests: Digests, training: Digests) -> tuple[Integers, Integers]:
    """Returns the indices of examples that almost repeat one of `training`, and of that one."""
    if not (len(digests) and len(training)):
        return NO_ROWS, NO_ROWS
    trained = WordIndex.of(training)
    index = WordIndex.of(digests, trained)
    all_keys, informative = _all_keys(index, np.ones(len(index), dtype=bool))
    keys, slots = np.unique(all_keys.reshape(-1), return_inverse=True)
    candidates = np.full((len(keys), _RECENT + 1), -1, dtype=np.int64)
    counts = np.zeros(len(keys), dtype=np.int64)
    informative_trained = np.zeros(len(trained), dtype=np.int32)
    for start, end in trained.spans():
        span_keys, informative_trained[start:end] = _pair_keys(trained, start, end)
        flat = span_keys.reshape(-1)
        slot = np.minimum(np.searchsorted(keys, flat), len(keys) - 1)
        matches = np.flatnonzero((keys[slot] == flat) & (flat != 0))
        matches = matches[np.argsort(slot[matches], kind="stable")]
        slot, example = slot[matches], start + matches // len(_PAIRS)
        rank = counts[slot] + np.arange(len(slot)) - np.searchsorted(slot, slot)
        free = rank <= _RECENT
        candidates[slot[free], rank[free]] = example[free]
        counts += np.bincount(slot, minlength=len(keys))
    later = np.repeat(np.arange(len(index)), len(_PAIRS) * (_RECENT + 1))
    earlier = candidates[slots.reshape(-1)].reshape(-1)
    packed = distinct((later * len(trained) + earlier)[earlier >= 0])
    return _find_first(index, trained, packed, informative, informative_trained)


def _pack_pairs(one: NDArray[np.int32], other: NDArray[np.int32], size: int) -> Integers:
    """Returns the distinct pairs of examples, each as later × `size` + earlier."""
    later, earlier = np.maximum(one, other).astype(np.int64), np.minimum(one, other)
    return distinct((later * size + earlier)[later != earlier])


def _bucket(hashes: Words) -> Integers:
    return (mix(np.asarray(hashes)) & np.uint32(_BUCKETS - 1)).astype(np.int64)


def _all_keys(index: WordIndex, selected: Mask) -> tuple[Keys, NDArray[np.int32]]:
    """Returns keys for finding candidates, `(examples, 6)`, and counts of informative words.

    A key hashes two of the four rarest words of an example, or is 0. Boilerplate is not used.
    """
    keys = np.zeros((len(index), len(_PAIRS)), dtype=np.uint32)
    informative = np.zeros(len(index), dtype=np.int32)
    for start, end in index.spans():
        span_keys, informative[start:end] = _pair_keys(index, start, end)
        keys[start:end] = span_keys * selected[start:end, None]
    return keys, informative


def _pair_keys(index: WordIndex, start: int, end: int) -> tuple[Keys, Integers]:
    """Returns the result of `_all_keys` for the examples from `start` to `end`."""
    starts, records = index.starts[start : end + 1], index.digests.records[start:end]
    hashes = np.asarray(index.digests.words[starts[0] : starts[-1]])
    counts = index.counts[_bucket(hashes)]
    row = np.repeat(np.arange(end - start), np.diff(starts))
    informative = np.bincount(row[counts < index.limit], minlength=end - start)
    # One sort orders the words of each row by frequency.
    packed = row.astype(np.uint64) << np.uint64(48)
    packed |= np.minimum(counts, 0xFFFF).astype(np.uint64) << np.uint64(32)
    packed |= hashes.astype(np.uint64)
    packed = distinct(packed)
    row = (packed >> np.uint64(48)).astype(np.int64)
    first = np.searchsorted(row, np.arange(end - start))
    sizes = np.diff(first, append=len(row))
    sizes[(records["prompt"] == MAX_WORDS) | (records["answer"] == MAX_WORDS)] = 0  # cut
    rarest = np.zeros((end - start, _RAREST), dtype=np.uint32)
    for k in range(_RAREST):
        mask = sizes > k
        rarest[mask, k] = mix(packed[first[mask] + k].astype(np.uint32))
    keys = np.zeros((end - start, len(_PAIRS)), dtype=np.uint32)
    for column, (i, k) in enumerate(_PAIRS):
        mask = sizes > k
        one, other = rarest[mask, i], rarest[mask, k]
        low, high = np.minimum(one, other), np.maximum(one, other)
        keys[mask, column] = mix(low * np.uint32(31) + high)
    return keys, informative


def _find_first(
    index: WordIndex,
    earlier: WordIndex,
    pairs: Integers,
    informative: NDArray[np.int32],
    informative_earlier: NDArray[np.int32],
) -> tuple[Integers, Integers]:
    """Returns indices of examples of `index` that almost repeat one of `earlier`, and of that one.

    `pairs` has sorted candidates: example of `index` × size of `earlier` + example of `earlier`.
    The last two arguments count informative words per example.
    """
    result: list[tuple[Integers, Integers]] = []
    start = 0
    while start < len(pairs):
        last = pairs[min(start + _GROUP_WORDS, len(pairs)) - 1]
        end = int(np.searchsorted(pairs, (last // len(earlier) + 1) * len(earlier)))  # all pairs
        a, b = np.divmod(pairs[start:end], len(earlier))
        start = end
        limits = compute_max_distance(np.minimum(informative[a], informative_earlier[b]))
        while len(a):  # compare each example until the first match
            heads = np.diff(a, prepend=-1) != 0
            matches = _is_match(index, a[heads], earlier, b[heads], limits[heads])
            result.append((a[heads][matches], b[heads][matches]))
            rest = ~heads & ~np.isin(a, a[heads][matches])
            a, b, limits = a[rest], b[rest], limits[rest]
    return sort_pairs(result)


def _is_match(
    index: WordIndex, a: Integers, earlier: WordIndex, b: Integers, limits: Integers
) -> Mask:
    """Returns whether examples `a[i]` and `b[i]` differ by at most `limits[i]` half words."""
    matches = _may_match(index, a, earlier, b, limits)
    records, others = index.digests.records[a], earlier.digests.records[b]
    matches &= ~((records["marks"] & ONE_CLASS != 0) & (records["last"] != others["last"]))
    pairs = np.flatnonzero(matches)
    lengths = index.lengths[a[pairs]]
    order = np.argsort(lengths, kind="stable")
    for group in split_by_size(pairs[order], lengths[order], _GROUP_WORDS):
        distances = compute_distances(index.sides(a[group]), earlier.sides(b[group]))
        matches[group] = distances <= limits[group]
    return matches


def _may_match(
    index: WordIndex, a: Integers, earlier: WordIndex, b: Integers, limits: Integers
) -> Mask:
    """Returns for each pair whether enough words, or word bigrams of long texts, are shared.

    One half word of difference removes at most one common word or two common bigrams.
    """
    sizes = index.lengths[a], earlier.lengths[b]
    matches = (np.abs(sizes[0] - sizes[1]) <= limits) & (limits > 0)
    longer = np.maximum(*sizes)
    for bigrams in (False, True):
        pairs = np.flatnonzero(matches & ((longer >= _LONG_TEXT) == bigrams))
        least = longer - (2 * limits + 1 if bigrams else limits)
        for group in split_by_size(pairs, (sizes[0] + sizes[1])[pairs], _GROUP_WORDS):
            shared = _count_common(index, a[group], earlier, b[group], bigrams=bigrams)
            matches[group] = shared >= least[group]
    return matches


def _count_common(
    index: WordIndex, a: Integers, earlier: WordIndex, b: Integers, *, bigrams: bool
) -> Integers:
    parts = []
    for side, (source, examples) in enumerate(((index, a), (earlier, b))):
        words, lengths = source.gather(examples)
        pair = np.repeat(np.arange(len(examples)), lengths)
        if bigrams:
            first = np.flatnonzero(pair[1:] == pair[:-1])
            pair, words = pair[first], mix(mix(words[first]) * np.uint32(31) + words[first + 1])
        parts.append(pair << 33 | words.astype(np.int64) << 1 | side)
    both = np.sort(np.concatenate(parts))
    word = both >> 1
    begins = np.flatnonzero(np.diff(word, prepend=-1))
    second = np.add.reduceat(both & 1, begins) if len(begins) else begins
    total = np.diff(begins, append=len(both))
    least = np.minimum(second, total - second)
    return np.bincount(word[begins] >> 32, least, minlength=len(a)).astype(np.int64)
