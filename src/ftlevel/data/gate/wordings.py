"""Rows that say nearly the same in nearly the same words, short ones too.

Two texts of which two words differ have at least two of the four rarest words of each in common
(the prefix filter of set similarity joins: Chaudhuri, Ganti and Kaushik, 2006; Bayardo, Ma and
Srikant, 2007). So a text is looked up by the six pairs of its four rarest words, and compared in
full with some of those that have such a pair too, and no others: time is linear in the words
whatever the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ftlevel.data.gate.digests import MOST_WORDS, ONE_CLASS, Digests, Words
from ftlevel.data.gate.distance import Sides, Texts, allow, differ
from ftlevel.data.gate.flat import Integers, Mask
from ftlevel.data.gate.similarity import mix

_RAREST = 4
_PAIRS = tuple(combinations(range(_RAREST), 2))
_BUCKETS = 1 << 20
_AT_ONCE = 1 << 20
_SOME = 1 << 16  # words that are looked at together
_BOILERPLATE, _MANY = 0.98, 20
_LAST = 2  # earlier rows with the same pair of words that a row is compared with, beside the first
_MANY_WORDS = 30
Keys = NDArray[np.uint32]
_NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Index:
    """The words of examples, and how often each occurs in the training set.

    Attributes:
        digests: of the examples.
        starts: where the words of each begin, and the end.
        counts: of words, by 20 bits of their hash.
        usual: a word that occurs so often is in nearly every row, and tells none apart.
    """

    digests: Digests
    starts: Integers
    counts: Integers
    usual: float

    @classmethod
    def of(cls, digests: Digests, like: Index | None = None) -> Index:
        """Return the index of `digests`, with the counts of another one if it is given."""
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
        """The number of words of each."""
        return np.diff(self.starts)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield where parts of some thousand words begin and end, in examples."""
        begin = 0
        while begin < len(self):
            end = int(np.searchsorted(self.starts, self.starts[begin] + _SOME, "right")) - 1
            end = min(max(end, begin + 1), len(self))
            yield begin, end
            begin = end

    def sides(self, at: Integers) -> Sides:
        """Return the words that some examples are asked, and those that they answer."""
        asked = self.digests.records["asked"][at].astype(np.int64)
        begins = self.starts[at]
        return (
            self._texts(begins, asked),
            self._texts(begins + asked, self.lengths[at] - asked),
        )

    def _texts(self, begins: Integers, sizes: Integers) -> Texts:
        places = begins + np.arange(np.max(sizes, initial=0))[:, None]
        return Texts(self.digests.words[np.minimum(places, len(self.digests.words) - 1)], sizes)

    def gather(self, at: Integers) -> tuple[Words, Integers]:
        """Return the words of several examples end to end, and how many each has."""
        lengths = self.lengths[at]
        before = np.cumsum(lengths) - lengths
        places = np.repeat(self.starts[at] - before, lengths) + np.arange(lengths.sum())
        return self.digests.words[places], lengths


def find_near_texts(digests: Digests, skip: Mask) -> tuple[Integers, Integers]:
    """Return the examples that nearly say what an earlier one says, and for each which.

    Args:
        digests: of a split.
        skip: which of them to leave out, being known duplicates.
    """
    index = Index.of(digests)
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


def find_near_between(digests: Digests, known: Digests) -> tuple[Integers, Integers]:
    """Return the examples of `digests` that nearly say what one of `known` says, and which."""
    if not (len(digests) and len(known)):
        return _NOTHING, _NOTHING
    there = Index.of(known)
    index = Index.of(digests, there)
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
    """Pairs of a row and an earlier one, each once."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._packed = [np.zeros(0, dtype=np.int64)]

    def add(self, one: NDArray[np.int32], other: NDArray[np.int32]) -> None:
        later, earlier = np.maximum(one, other).astype(np.int64), np.minimum(one, other)
        packed = (later * self._count + earlier)[later != earlier]
        self._packed.append(_distinct(packed))

    def sorted(self) -> Integers:
        """Return each as later × rows + earlier."""
        return _distinct(np.concatenate(self._packed))


def _distinct(numbers: Integers) -> Integers:
    """Return each of some numbers from 0 on once, in order."""
    numbers = np.sort(numbers)
    return numbers[np.diff(numbers, prepend=-1) != 0]


def _parts(keys: Keys) -> Iterator[Integers]:
    """Yield where keys stand, those of one remainder together, without those that are 0."""
    count = -(-len(keys) // _AT_ONCE)
    for remainder in range(count):
        places = []
        for begin in range(0, len(keys), _AT_ONCE):
            some = keys[begin : begin + _AT_ONCE]
            places.append(begin + np.flatnonzero((some % count == remainder) & (some != 0)))
        yield np.concatenate(places)


def _bucket(words: Words) -> Integers:
    return (mix(np.asarray(words)) & np.uint32(_BUCKETS - 1)).astype(np.int64)


def _all_keys(index: Index, wanted: Mask) -> tuple[Keys, NDArray[np.int32]]:
    """Return the keys `(examples, 6)`, 0 for none, and how many words tell each apart."""
    keys = np.zeros((len(index), len(_PAIRS)), dtype=np.uint32)
    telling = np.zeros(len(index), dtype=np.int32)
    for begin, end in index.spans():
        some, telling[begin:end] = _pair_keys(index, begin, end)
        keys[begin:end] = some * wanted[begin:end, None]
    return keys, telling


def _pair_keys(index: Index, begin: int, end: int) -> tuple[Keys, Integers]:
    """Return what `_all_keys` returns, of the examples from `begin` to `end`."""
    starts, records = index.starts[begin : end + 1], index.digests.records[begin:end]
    words = np.asarray(index.digests.words[starts[0] : starts[-1]])
    counts = index.counts[_bucket(words)]
    row = np.repeat(np.arange(end - begin), np.diff(starts))
    telling = np.bincount(row[counts < index.usual], minlength=end - begin)
    # One sort puts each row's words in the order of their counts.
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
    one: Index,
    other: Index,
    packed: Integers,
    telling: NDArray[np.int32],
    known: NDArray[np.int32],
) -> tuple[Integers, Integers]:
    """Return which of `one` are nearly one of `other`, and the first such of each.

    Args:
        one: the later rows.
        other: those that they are compared with.
        packed: what to compare, in order: row of `one` × rows of `other` + row of `other`.
        telling: how many words tell each of `one` apart from the rest of the set.
        known: the same of `other`.
    """
    found = [(_NOTHING, _NOTHING)]
    begin = 0
    while begin < len(packed):
        last = packed[min(begin + _SOME, len(packed)) - 1]
        end = int(np.searchsorted(packed, (last // len(other) + 1) * len(other)))  # whole rows
        these, those = np.divmod(packed[begin:end], len(other))
        begin = end
        allowed = allow(np.minimum(telling[these], known[those]))
        while len(these):  # as often as a row has pairs: it is compared until it is found
            heads = np.diff(these, prepend=-1) != 0
            near = _are_near(one, these[heads], other, those[heads], allowed[heads])
            found.append((these[heads][near], those[heads][near]))
            rest = ~heads & ~np.isin(these, these[heads][near])
            these, those, allowed = these[rest], those[rest], allowed[rest]
    again, first = map(np.concatenate, zip(*found, strict=True))
    order = np.argsort(again)
    return again[order], first[order]


def _are_near(
    one: Index, these: Integers, other: Index, those: Integers, allowed: Integers
) -> Mask:
    """Tell for each pair whether the two say nearly the same, in `allowed` half words at most."""
    found = _may_be_near(one, these, other, those, allowed)
    records, others = one.digests.records[these], other.digests.records[those]
    found &= ~((records["marks"] & ONE_CLASS != 0) & (records["last"] != others["last"]))
    possible = np.flatnonzero(found)
    possible = possible[np.argsort(one.lengths[these[possible]], kind="stable")]
    until = np.cumsum(one.lengths[these[possible]])
    for some in np.split(possible, np.flatnonzero(np.diff(until // _SOME)) + 1):
        halves = differ(one.sides(these[some]), other.sides(those[some]))
        found[some] = halves <= allowed[some]
    return found


def _may_be_near(
    one: Index, these: Integers, other: Index, those: Integers, allowed: Integers
) -> Mask:
    """Tell for each pair whether they have enough words, or pairs of neighbours, in common.

    A half word that differs is one word at most, and two of the pairs of neighbours, which tell
    more where there are many.
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
    one: Index, these: Integers, other: Index, those: Integers, *, neighbours: bool
) -> Integers:
    """Return how many words each pair has in common, or how many pairs of neighbours."""
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
