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
from ftlevel.data.gate.similarity import MOST_WORDS, ONE_CLASS, Digests, Words, mix

_SLIP, _OTHER = 1, 2  # half words
FEWEST = 4
"""Minimum number of words for one typo to be allowed."""
_FEW = 8
_SHARE = 5  # one word in five may differ
_MOST = 6  # half words
_EACH = 10  # one word in ten of each side, if both differ
_MUCH = 1 << 20
_BAND = _MOST // _OTHER  # maximum number of missing words
_OFFSETS = np.arange(-_BAND, _BAND + 1)[:, None]
_LETTERS = 0x1FFF
_BITS = np.array([n.bit_count() for n in range(_LETTERS + 1)], dtype=np.uint8)


@dataclass(frozen=True)
class TextBatch:
    """One text of each of several pairs, as word hashes `(longest, pairs)` and `sizes`.

    Entries of `words` after the end of a text are undefined.
    """

    words: NDArray[np.uint32]
    sizes: NDArray[np.int64]

    def take(self, at: Any) -> TextBatch:
        """Return the texts at `at`."""
        return TextBatch(self.words[:, at], self.sizes[at])


Sides = tuple[TextBatch, TextBatch]


def compute_max_distance(words: Any) -> Any:
    """Return the maximum distance in half words for texts of `words` words (an array)."""
    many = np.minimum(words * _OTHER // _SHARE, _MOST)
    return np.where(words >= _FEW, many, np.where(words >= FEWEST, _SLIP, 0))


def compute_distances(one: Sides, other: Sides) -> NDArray[np.int64]:
    """Return the distance of each pair in half words, or a very large value.

    Pairs that differ substantially in both prompt and answer are not duplicates; neither are those
    whose answer of fewer than four words differs by more than a typo.
    """
    asked = compute_edit_distances(one[0], other[0])
    answered = np.full(len(asked), _MUCH, dtype=np.int64)
    near = np.flatnonzero(asked <= _MOST)
    answered[near] = compute_edit_distances(one[1].take(near), other[1].take(near))
    of_asked, of_answered = (np.minimum(a.sizes, b.sizes) for a, b in zip(one, other, strict=True))
    another = (one[0].sizes > 0) & (answered > _SLIP) & (of_answered < FEWEST)
    both = (asked > 0) & (answered > 0) & (asked + answered > 2 * _SLIP)
    many = (_EACH * asked > _OTHER * of_asked) | (_EACH * answered > _OTHER * of_answered)
    return np.where(another | (both & many), _MUCH, asked + answered)


def compute_edit_distances(one: TextBatch, other: TextBatch) -> NDArray[np.int64]:
    """Return the edit distance of each pair in half words, or `_MUCH` above `_MOST`.

    It is the Damerau-Levenshtein distance (optimal string alignment) over words, in a band.
    """
    result = np.full(len(one.sizes), _MUCH, dtype=np.int64)
    open_ = np.flatnonzero(np.abs(one.sizes - other.sizes) <= _BAND)
    # Row k of `b` is word k - _BAND, so rows i - 1 to i + 5 are in the band of word i.
    a, b = one.words, np.pad(other.words, ((_BAND, 0), (0, 0)))
    b = np.pad(b, ((0, max(0, len(a) + 2 * _BAND - len(b))), (0, 0)))
    a, b, sizes, ends = a[:, open_], b[:, open_], one.sizes[open_], other.sizes[open_]
    row = _edge(0, ends)
    before = row
    for i in range(len(a) + 1):
        if i:
            earlier, before = before, row
            row = _next_row(i, a, b, before, earlier, ends)
        at = np.flatnonzero(sizes == i)
        result[open_[at]] = row[ends[at] - i + _BAND, at]
        going = (sizes > i) & (row.min(axis=0) <= _MOST)
        if not going.any():
            break
        if 2 * np.count_nonzero(going) < len(going):
            a, b, row, before = a[:, going], b[:, going], row[:, going], before[:, going]
            open_, sizes, ends = open_[going], sizes[going], ends[going]
    result[result > _MOST] = _MUCH
    return result


def _edge(i: int, ends: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return row i of the distance matrix `(band, pairs)` without matched words."""
    j = i + _OFFSETS
    known = (j >= 0) & (j <= ends) if i == 0 else np.broadcast_to(j == 0, (len(j), len(ends)))
    return np.where(known, (i + j) * _OTHER, _MUCH).astype(np.int32)


def _next_row(
    i: int,
    a: NDArray[np.uint32],
    b: NDArray[np.uint32],
    before: NDArray[np.int32],
    earlier: NDArray[np.int32],
    ends: NDArray[np.int64],
) -> NDArray[np.int32]:
    """Compute row i of the distance matrix from the two previous rows."""
    word, others = a[i - 1], b[i - 1 : i + 2 * _BAND]
    step = np.where(word == others, 0, np.where(is_typo(word, others), _SLIP, _OTHER))
    row = before + step.astype(np.int32)
    np.minimum(row[:-1], before[1:] + _OTHER, out=row[:-1])
    if i > 1:
        swapped = (word == b[i - 2 : i + 2 * _BAND - 1]) & (a[i - 2] == others)
        swapped &= i + _OFFSETS > 1
        row = np.where(swapped, np.minimum(row, earlier + _OTHER), row)
    j = i + _OFFSETS
    row = np.where((j >= 1) & (j <= ends), row, _edge(i, ends))
    each = (_OTHER * np.arange(len(row), dtype=np.int32))[:, None]  # insertions
    row = np.minimum.accumulate(row - each, axis=0) + each
    return np.where(j <= ends, row, np.int32(_MUCH))


def is_typo(word: Any, other: Any) -> Any:
    """Return whether two words (32-bit hashes) differ by a typo: similar letters and no digit."""
    longest = np.maximum(_BITS[word & _LETTERS], _BITS[other & _LETTERS])
    lengths = ((word >> 13) - (other >> 13)) & 3  # letters, modulo 4
    apart = _BITS[(word ^ other) & _LETTERS]
    no_digit = (word | other) & 0x8000 == 0
    return no_digit & (longest >= FEWEST) & (lengths != 2) & (apart <= 1 + (lengths == 0))


_RAREST = 4
_PAIRS = tuple(combinations(range(_RAREST), 2))
_BUCKETS = 1 << 20
_AT_ONCE = 1 << 20
_SOME = 1 << 16  # words processed together
_BOILERPLATE, _MANY = 0.98, 20
_LAST = 2  # earlier candidates to compare, in addition to the first
_MANY_WORDS = 30
Keys = NDArray[np.uint32]
_NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class WordIndex:
    """Word offsets of examples, and word frequencies in the training set.

    Attributes:
        digests: digests of the examples.
        starts: `(examples + 1,)` offsets of the words of each example.
        counts: word frequencies, by 20 bits of the hash.
        usual: frequency above which a word occurs in nearly every row and is ignored.
    """

    digests: Digests
    starts: Integers
    counts: Integers
    usual: float

    @classmethod
    def of(cls, digests: Digests, like: WordIndex | None = None) -> WordIndex:
        """Build the index of `digests`, with the frequencies of `like` if it is given."""
        records = digests.records
        starts = np.zeros(len(digests) + 1, dtype=np.int64)
        np.cumsum(records["asked"].astype(np.int64) + records["answered"], out=starts[1:])
        if like is not None:
            return cls(digests, starts, like.counts, like.usual)
        counts = np.zeros(_BUCKETS, dtype=np.int64)
        total = int(starts[-1])
        for begin in range(0, total, _AT_ONCE):
            some = digests.words[begin : min(begin + _AT_ONCE, total)]
            counts += np.bincount(_bucket(some), minlength=_BUCKETS)
        usual = _BOILERPLATE * len(digests) if len(digests) >= _MANY else np.inf
        return cls(digests, starts, counts, usual)

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def lengths(self) -> Integers:
        """Number of words of each example."""
        return np.diff(self.starts)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of examples with about `_SOME` words in total."""
        begin = 0
        while begin < len(self):
            end = int(np.searchsorted(self.starts, self.starts[begin] + _SOME, "right")) - 1
            end = min(max(end, begin + 1), len(self))
            yield begin, end
            begin = end

    def sides(self, at: Integers) -> Sides:
        """Return the words of prompts and answers of the examples at `at`."""
        asked = self.digests.records["asked"][at].astype(np.int64)
        begins = self.starts[at]
        return (
            self._texts(begins, asked),
            self._texts(begins + asked, self.lengths[at] - asked),
        )

    def _texts(self, begins: Integers, sizes: Integers) -> TextBatch:
        places = begins + np.arange(np.max(sizes, initial=0))[:, None]
        return TextBatch(self.digests.words[np.minimum(places, len(self.digests.words) - 1)], sizes)

    def gather(self, at: Integers) -> tuple[Words, Integers]:
        """Return the concatenated words of the examples at `at`, and the number of each."""
        lengths = self.lengths[at]
        before = np.cumsum(lengths) - lengths
        places = np.repeat(self.starts[at] - before, lengths) + np.arange(lengths.sum())
        return self.digests.words[places], lengths


def find_near_texts(digests: Digests, skip: Mask) -> tuple[Integers, Integers]:
    """Return near duplicates of earlier examples, and the earlier example of each.

    `skip` marks known duplicates.
    """
    index = WordIndex.of(digests)
    keys, telling = _all_keys(index, ~skip)
    owners = np.repeat(np.arange(len(index), dtype=np.int32), len(_PAIRS))
    pairs = _Pairs(len(index))
    flat = keys.reshape(-1)
    for chosen in _parts(flat):
        chosen = chosen[np.argsort(flat[chosen], kind="stable")]
        key, owner = flat[chosen], owners[chosen]
        begins = np.flatnonzero(np.diff(key, prepend=key[:1] ^ np.uint32(1)))
        first = np.repeat(owner[begins], np.diff(begins, append=len(key)))
        pairs.add(owner, first)
        for lag in range(1, _LAST + 1):
            same = key[lag:] == key[:-lag]
            pairs.add(owner[lag:][same], owner[:-lag][same])
    return _find_first(index, index, pairs.sorted(), telling, telling)


def find_near_leaks(digests: Digests, known: Digests) -> tuple[Integers, Integers]:
    """Return examples of `digests` that nearly repeat one of `known`, and which one."""
    if not (len(digests) and len(known)):
        return _NOTHING, _NOTHING
    there = WordIndex.of(known)
    index = WordIndex.of(digests, there)
    keys, telling = _all_keys(index, np.ones(len(index), dtype=bool))
    wanted, slot = np.unique(keys.reshape(-1), return_inverse=True)
    held = np.full((len(wanted), _LAST + 1), -1, dtype=np.int64)
    count = np.zeros(len(wanted), dtype=np.int64)
    of_known = np.zeros(len(there), dtype=np.int32)
    for begin, end in there.spans():
        some, of_known[begin:end] = _pair_keys(there, begin, end)
        flat = some.reshape(-1)
        at = np.minimum(np.searchsorted(wanted, flat), len(wanted) - 1)
        hit = np.flatnonzero((wanted[at] == flat) & (flat != 0))
        at, row = at[hit], begin + hit // len(_PAIRS)
        for _ in range(_LAST + 1):
            open_ = count[at] <= _LAST
            at, row = at[open_], row[open_]
            found, once = np.unique(at, return_index=True)
            held[found, count[found]] = row[once]
            count[found] += 1
            rest = np.ones(len(at), dtype=bool)
            rest[once] = False
            at, row = at[rest], row[rest]
    owner = np.repeat(np.arange(len(index)), len(_PAIRS))
    these = np.repeat(owner, _LAST + 1)
    those = held[slot.reshape(-1)].reshape(-1)
    packed = np.unique(these[those >= 0] * len(there) + those[those >= 0])
    return _find_first(index, there, packed, telling, of_known)


class _Pairs:
    """Distinct pairs of a row and an earlier row."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._packed = [np.zeros(0, dtype=np.int64)]

    def add(self, one: NDArray[np.int32], other: NDArray[np.int32]) -> None:
        later, earlier = np.maximum(one, other).astype(np.int64), np.minimum(one, other)
        packed = (later * self._count + earlier)[later != earlier]
        self._packed.append(_distinct(packed))

    def sorted(self) -> Integers:
        """Return the distinct pairs as later × rows + earlier."""
        return _distinct(np.concatenate(self._packed))


def _distinct(numbers: Integers) -> Integers:
    numbers = np.sort(numbers)
    return numbers[np.diff(numbers, prepend=-1) != 0]


def _parts(keys: Keys) -> Iterator[Integers]:
    """Yield positions of nonzero keys, grouped by remainder."""
    count = -(-len(keys) // _AT_ONCE)
    for remainder in range(count):
        places = []
        for begin in range(0, len(keys), _AT_ONCE):
            some = keys[begin : begin + _AT_ONCE]
            places.append(begin + np.flatnonzero((some % count == remainder) & (some != 0)))
        yield np.concatenate(places)


def _bucket(words: Words) -> Integers:
    return (mix(np.asarray(words)) & np.uint32(_BUCKETS - 1)).astype(np.int64)


def _all_keys(index: WordIndex, wanted: Mask) -> tuple[Keys, NDArray[np.int32]]:
    """Return pair keys `(examples, 6)`, 0 for none, and the informative words of each example."""
    keys = np.zeros((len(index), len(_PAIRS)), dtype=np.uint32)
    telling = np.zeros(len(index), dtype=np.int32)
    for begin, end in index.spans():
        some, telling[begin:end] = _pair_keys(index, begin, end)
        keys[begin:end] = some * wanted[begin:end, None]
    return keys, telling


def _pair_keys(index: WordIndex, begin: int, end: int) -> tuple[Keys, Integers]:
    """Return the result of `_all_keys` for the examples from `begin` to `end`."""
    starts, records = index.starts[begin : end + 1], index.digests.records[begin:end]
    words = np.asarray(index.digests.words[starts[0] : starts[-1]])
    counts = index.counts[_bucket(words)]
    row = np.repeat(np.arange(end - begin), np.diff(starts))
    telling = np.bincount(row[counts < index.usual], minlength=end - begin)
    # One sort orders the words of each row by frequency.
    packed = row.astype(np.uint64) << np.uint64(48)
    packed |= np.minimum(counts, 0xFFFF).astype(np.uint64) << np.uint64(32)
    packed |= words.astype(np.uint64)
    packed.sort()
    packed = packed[np.diff(packed, prepend=packed[:1] ^ np.uint64(1)) != 0]
    row = (packed >> np.uint64(48)).astype(np.int64)
    first = np.searchsorted(row, np.arange(end - begin))
    distinct = np.diff(first, append=len(row))
    distinct[(records["asked"] == MOST_WORDS) | (records["answered"] == MOST_WORDS)] = 0  # cut
    rarest = np.zeros((end - begin, _RAREST), dtype=np.uint32)
    for k in range(_RAREST):
        there = distinct > k
        rarest[there, k] = mix(packed[first[there] + k].astype(np.uint32))
    keys = np.zeros((end - begin, len(_PAIRS)), dtype=np.uint32)
    for column, (i, k) in enumerate(_PAIRS):
        there = distinct > k
        one, other = rarest[there, i], rarest[there, k]
        low, high = np.minimum(one, other), np.maximum(one, other)
        keys[there, column] = mix(low * np.uint32(31) + high)
    return keys, telling


def _find_first(
    one: WordIndex,
    other: WordIndex,
    packed: Integers,
    telling: NDArray[np.int32],
    known: NDArray[np.int32],
) -> tuple[Integers, Integers]:
    """Return examples of `one` that nearly repeat one of `other`, and the first match of each.

    `packed` has sorted candidates: example of `one` × size of `other` + example of `other`.
    `telling` and `known` count informative words per example.
    """
    found = [(_NOTHING, _NOTHING)]
    begin = 0
    while begin < len(packed):
        last = packed[min(begin + _SOME, len(packed)) - 1]
        end = int(np.searchsorted(packed, (last // len(other) + 1) * len(other)))  # whole rows
        these, those = np.divmod(packed[begin:end], len(other))
        begin = end
        allowed = compute_max_distance(np.minimum(telling[these], known[those]))
        while len(these):  # compare each row until the first match
            heads = np.diff(these, prepend=-1) != 0
            near = _are_near(one, these[heads], other, those[heads], allowed[heads])
            found.append((these[heads][near], those[heads][near]))
            rest = ~heads & ~np.isin(these, these[heads][near])
            these, those, allowed = these[rest], those[rest], allowed[rest]
    again, first = map(np.concatenate, zip(*found, strict=True))
    order = np.argsort(again)
    return again[order], first[order]


def _are_near(
    one: WordIndex, these: Integers, other: WordIndex, those: Integers, allowed: Integers
) -> Mask:
    """Return for each pair whether it differs by at most `allowed` half words."""
    found = _may_be_near(one, these, other, those, allowed)
    records, others = one.digests.records[these], other.digests.records[those]
    found &= ~((records["marks"] & ONE_CLASS != 0) & (records["last"] != others["last"]))
    possible = np.flatnonzero(found)
    possible = possible[np.argsort(one.lengths[these[possible]], kind="stable")]
    until = np.cumsum(one.lengths[these[possible]])
    for some in np.split(possible, np.flatnonzero(np.diff(until // _SOME)) + 1):
        halves = compute_distances(one.sides(these[some]), other.sides(those[some]))
        found[some] = halves <= allowed[some]
    return found


def _may_be_near(
    one: WordIndex, these: Integers, other: WordIndex, those: Integers, allowed: Integers
) -> Mask:
    """Return for each pair whether enough words, or word bigrams of long texts, are shared.

    One half word of difference removes at most one common word or two common bigrams.
    """
    sizes = one.lengths[these], other.lengths[those]
    found = (np.abs(sizes[0] - sizes[1]) <= allowed) & (allowed > 0)
    longer = np.maximum(*sizes)
    for neighbours in (False, True):
        possible = np.flatnonzero(found & ((longer >= _MANY_WORDS) == neighbours))
        until = np.cumsum((sizes[0] + sizes[1])[possible])
        least = longer - (2 * allowed + 1 if neighbours else allowed)
        for some in np.split(possible, np.flatnonzero(np.diff(until // _SOME)) + 1):
            common = _count_common(one, these[some], other, those[some], neighbours=neighbours)
            found[some] = common >= least[some]
    return found


def _count_common(
    one: WordIndex, these: Integers, other: WordIndex, those: Integers, *, neighbours: bool
) -> Integers:
    """Return the number of common words, or of common bigrams, of each pair."""
    parts = []
    for side, (index, at) in enumerate(((one, these), (other, those))):
        words, lengths = index.gather(at)
        pair = np.repeat(np.arange(len(at)), lengths)
        if neighbours:
            inside = np.flatnonzero(pair[1:] == pair[:-1])
            pair, words = pair[inside], mix(mix(words[inside]) * np.uint32(31) + words[inside + 1])
        parts.append(pair << 33 | words.astype(np.int64) << 1 | side)
    both = np.sort(np.concatenate(parts))
    word = both >> 1
    begins = np.flatnonzero(np.diff(word, prepend=-1))
    second = np.add.reduceat(both & 1, begins) if len(begins) else begins
    total = np.diff(begins, append=len(both))
    least = np.minimum(second, total - second)
    return np.bincount(word[begins] >> 32, least, minlength=len(these)).astype(np.int64)
