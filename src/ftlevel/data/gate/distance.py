"""By how many words two texts differ, and how many may for them to be nearly the same.

Half words are counted, for a slip is half a word: another spelling of the same letters, but for
one. A text of fewer than eight words with another word is another text; with a slip it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_SLIP, _OTHER = 1, 2  # half words
FEWEST = 4
"""Words of which one may have a slip."""
_FEW = 8
_SHARE = 5  # one word in so many may differ
_MOST = 6  # half words
_EACH = 10  # and where both prompt and answer do, one in so many of each
_MUCH = 1 << 20
Sides = tuple[list[int], list[int]]


def allow(words: Any) -> Any:
    """Return how many half words may differ of texts of so many words (an array)."""
    many = np.minimum(words * _OTHER // _SHARE, _MOST)
    return np.where(words >= _FEW, many, np.where(words >= FEWEST, _SLIP, 0))


def differ(one: Sides, other: Sides) -> int:
    """Return by how many half words two examples differ; a great number if they say other things.

    Where both the prompt and the answer have other words, another thing is said of another thing.
    An answer of fewer than four words that is not the same but for a slip is another one.

    Args:
        one: the words that it is asked, and those that it answers.
        other: the same of another.
    """
    asked = count_other_words(one[0], other[0])
    answered = count_other_words(one[1], other[1]) if asked <= _MOST else _MUCH
    words = [min(len(a), len(b)) for a, b in zip(one, other, strict=True)]
    if one[0] and answered > _SLIP and words[1] < FEWEST:
        return _MUCH
    both = asked > 0 and answered > 0 and asked + answered > 2 * _SLIP
    if both and any(_EACH * n > _OTHER * w for n, w in zip((asked, answered), words, strict=True)):
        return _MUCH
    return asked + answered


def count_other_words(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the least number of half words by which one text becomes the other.

    It is the distance of Damerau and Levenshtein (optimal string alignment) over words, in a band
    of those that may matter; more than `_MOST` is `_MUCH`.
    """
    begin, end, least = 0, 0, min(len(one), len(other))
    while begin < least and one[begin] == other[begin]:
        begin += 1
    while end < least - begin and one[-1 - end] == other[-1 - end]:
        end += 1
    a, b = one[begin : len(one) - end], other[begin : len(other) - end]
    band = _MOST // _OTHER
    if abs(len(a) - len(b)) > band:
        return _MUCH
    row = {j: j * _OTHER for j in range(min(band, len(b)) + 1)}
    before = row
    for i, word in enumerate(a, 1):
        earlier, before, row = before, row, {0: i * _OTHER} if i <= band else {}
        for j in range(max(1, i - band), min(len(b), i + band) + 1):
            step = 0 if word == b[j - 1] else _SLIP if is_slip(word, b[j - 1]) else _OTHER
            least = min(
                before.get(j - 1, _MUCH) + step,
                before.get(j, _MUCH) + _OTHER,
                row.get(j - 1, _MUCH) + _OTHER,
            )
            if i > 1 and j > 1 and word == b[j - 2] and a[i - 2] == b[j - 1]:
                least = min(least, earlier.get(j - 2, _MUCH) + _OTHER)
            row[j] = least
        if min(row.values()) > _MOST:
            return _MUCH
    return row[len(b)] if row[len(b)] <= _MOST else _MUCH


def is_slip(word: int, other: int) -> bool:
    """Tell whether two words have nearly the same letters, enough of them, and no digit.

    Args:
        word: its 32 bits, as `digests` makes them.
        other: those of another.
    """
    if (word | other) & 0x8000:
        return False
    if max((word & 0x1FFF).bit_count(), (other & 0x1FFF).bit_count()) < FEWEST:
        return False
    longer = ((word >> 13) - (other >> 13)) & 3  # letters, modulo 4
    apart = ((word ^ other) & 0x1FFF).bit_count()
    return longer != 2 and apart <= (1 if longer else 2)
