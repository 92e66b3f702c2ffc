"""By how many words two texts differ, and how many may for them to be nearly the same.

Half words are counted, for a slip is half a word: another spelling of the same letters, but for
one. A text of fewer than eight words with another word is another text; with a slip it is not.
Many pairs are compared at once: step i of the recurrence is taken for all of them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SLIP, _OTHER = 1, 2  # half words
FEWEST = 4
"""Words of which one may have a slip."""
_FEW = 8
_SHARE = 5  # one word in so many may differ
_MOST = 6  # half words
_EACH = 10  # and where both prompt and answer do, one in so many of each
_MUCH = 1 << 20
_BAND = _MOST // _OTHER  # words that may be missing, at most
_OFFSETS = np.arange(-_BAND, _BAND + 1)[:, None]
_LETTERS = 0x1FFF
_BITS = np.array([n.bit_count() for n in range(_LETTERS + 1)], dtype=np.uint8)


@dataclass(frozen=True)
class Texts:
    """One text of each of several pairs.

    Attributes:
        words: `(longest, pairs)`; what stands behind a text's end is not looked at.
        sizes: the number of words of each.
    """

    words: NDArray[np.uint32]
    sizes: NDArray[np.int64]

    def take(self, at: Any) -> Texts:
        """Return those of some pairs."""
        return Texts(self.words[:, at], self.sizes[at])


Sides = tuple[Texts, Texts]


def allow(words: Any) -> Any:
    """Return how many half words may differ of texts of so many words (an array)."""
    many = np.minimum(words * _OTHER // _SHARE, _MOST)
    return np.where(words >= _FEW, many, np.where(words >= FEWEST, _SLIP, 0))


def differ(one: Sides, other: Sides) -> NDArray[np.int64]:
    """Return by how many half words the two of each pair differ; a great number if by many.

    Where both the prompt and the answer have other words, another thing is said of another thing.
    An answer of fewer than four words that is not the same but for a slip is another one.

    Args:
        one: the words that examples are asked, and those that they answer.
        other: the same of others.
    """
    asked = count_other_words(one[0], other[0])
    answered = np.full(len(asked), _MUCH, dtype=np.int64)
    near = np.flatnonzero(asked <= _MOST)
    answered[near] = count_other_words(one[1].take(near), other[1].take(near))
    of_asked, of_answered = (np.minimum(a.sizes, b.sizes) for a, b in zip(one, other, strict=True))
    another = (one[0].sizes > 0) & (answered > _SLIP) & (of_answered < FEWEST)
    both = (asked > 0) & (answered > 0) & (asked + answered > 2 * _SLIP)
    many = (_EACH * asked > _OTHER * of_asked) | (_EACH * answered > _OTHER * of_answered)
    return np.where(another | (both & many), _MUCH, asked + answered)


def count_other_words(one: Texts, other: Texts) -> NDArray[np.int64]:
    """Return the least number of half words by which one text of each pair becomes the other.

    It is the distance of Damerau and Levenshtein (optimal string alignment) over words, in a band
    of those that may matter; more than `_MOST` is `_MUCH`.
    """
    result = np.full(len(one.sizes), _MUCH, dtype=np.int64)
    open_ = np.flatnonzero(np.abs(one.sizes - other.sizes) <= _BAND)
    # Row k of `b` is word k - _BAND, so that rows i - 1 to i + 5 are those in the band of word i.
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
    """Return row i of the recurrence `(band, pairs)` where no word is matched."""
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
    """Return row i of the recurrence from the two before it."""
    word, others = a[i - 1], b[i - 1 : i + 2 * _BAND]
    step = np.where(word == others, 0, np.where(is_slip(word, others), _SLIP, _OTHER))
    row = before + step.astype(np.int32)
    np.minimum(row[:-1], before[1:] + _OTHER, out=row[:-1])
    if i > 1:
        swapped = (word == b[i - 2 : i + 2 * _BAND - 1]) & (a[i - 2] == others)
        swapped &= i + _OFFSETS > 1
        row = np.where(swapped, np.minimum(row, earlier + _OTHER), row)
    j = i + _OFFSETS
    row = np.where((j >= 1) & (j <= ends), row, _edge(i, ends))
    each = (_OTHER * np.arange(len(row), dtype=np.int32))[:, None]  # a word more
    row = np.minimum.accumulate(row - each, axis=0) + each
    return np.where(j <= ends, row, np.int32(_MUCH))


def is_slip(word: Any, other: Any) -> Any:
    """Tell whether two words have nearly the same letters, enough of them, and no digit (arrays).

    Args:
        word: its 32 bits, as `digests` makes them.
        other: those of another.
    """
    longest = np.maximum(_BITS[word & _LETTERS], _BITS[other & _LETTERS])
    lengths = ((word >> 13) - (other >> 13)) & 3  # letters, modulo 4
    apart = _BITS[(word ^ other) & _LETTERS]
    no_digit = (word | other) & 0x8000 == 0
    return no_digit & (longest >= FEWEST) & (lengths != 2) & (apart <= 1 + (lengths == 0))
