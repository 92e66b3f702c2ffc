"""What the gate keeps of each example's text, so that no later look needs the text itself.

A digest has 64 bits of the whole, of what stands before the last answer and of that answer, a bit
for each check of texts that found something, and the words as 32 bits each: 16 say which letters
a word has, so that words that differ by a slip are told from other words without their text.

Token 5-grams of rows, and whether two rows have most of them in common (Jaccard similarity).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.formats.examples import Example, parts_of
from ftlevel.data.gate.checks import TEXT_CHECKS, TextsKnown
from ftlevel.data.gate.flat import Integers, Mask, Ragged, gather

MOST_COMPARED = 250_000
"""Examples whose words are compared with one another, which takes up to 150 bytes each."""

MOST_WORDS = 4_000
"""Words that are kept of what an example is asked, and of what it answers."""

_RECORD = np.dtype(
    [("key", "u8"), ("before", "u8"), ("last", "u8"), ("marks", "u4"), ("asked", "u2"),
     ("answered", "u2")]
)  # fmt: skip
# Chinese and Japanese have no spaces: there each character is a word.
_WORD = re.compile(r"[^\W\u3040-\u30ff\u3400-\u9fff]+|[\u3040-\u30ff\u3400-\u9fff]")
_TO_SPACES = {code: " " for code in range(128) if not _WORD.match(chr(code))}
_LONGEST = 16 * MOST_WORDS  # characters in which these words are looked for
_KNOWN_WORDS = 50_000
_HAS_DIGIT = 1 << 15
ONE_CLASS = np.uint32(1 << 31)
"""The mark of an example that has a class: another class makes it another row."""
_FACTOR, _ALL_BITS = 0x9E3779B97F4A7C15, (1 << 64) - 1
Words = NDArray[np.uint32]


class _WordHashes(dict[str, int]):
    """Word → its 32 bits: 16 of a checksum, and 15 that say which letters it has.

    Of a word with a digit these are the checksum's too: 1904 for 1905 is no slip.
    """

    def __missing__(self, word: str) -> int:
        if len(self) >= _KNOWN_WORDS:
            self.clear()
        check = crc32(word.encode("utf-8", "surrogatepass"))
        if any(map(str.isdigit, word)):
            value = check | _HAS_DIGIT
        else:
            letters = 0
            for letter in word:
                letters |= 1 << ord(letter) % 13
            value = check & 0xFFFF0000 | (len(word) & 3) << 13 | letters
        self[word] = value
        return value


_hashes = _WordHashes()


@dataclass(frozen=True)
class Digests:
    """The digests of several examples, in memory or on disk.

    Attributes:
        records: a fixed number of bytes for each.
        words: of all, end to end; of each example what is asked, then what is answered.
    """

    records: NDArray[Any]
    words: Words

    @classmethod
    def of(cls, examples: Iterable[Example], known: TextsKnown) -> Digests:
        """Return the digests of `examples`."""
        records: list[tuple[int, ...]] = []
        words: list[int] = []
        checks = [(1 << number, find) for number, find in enumerate(TEXT_CHECKS.values())]
        for example in examples:
            parts = parts_of(example)
            asked, answered = parts.asked.casefold(), parts.answered.casefold()
            of_asked, of_answered = _words(asked), _words(answered)
            marks = sum(bit for bit, find in checks if find(parts, known))
            marks |= int(ONE_CLASS) * parts.one_class
            before = last = 0
            if parts.before:
                before = _key(asked if parts.before is parts.asked else parts.before.casefold())
                last = _key(answered if parts.last is parts.answered else parts.last.casefold())
                key = (before * _FACTOR + last) & _ALL_BITS
            else:
                key = _key(example.key_text.casefold())
            records.append((key, before, last, marks, len(of_asked), len(of_answered)))
            words += of_asked
            words += of_answered
        return cls(np.array(records, dtype=_RECORD), np.array(words, dtype=np.uint32))

    @classmethod
    def at(cls, path: Path) -> Digests:
        """Map what was written to `path` by `to_bytes`."""
        words = words_path(path)
        return cls(
            np.memmap(path, _RECORD, "r"),
            np.memmap(words, np.uint32, "r") if words.stat().st_size else _NO_WORDS,
        )

    def to_bytes(self) -> tuple[bytes, bytes]:
        """Return the contents of the two files that `at` maps."""
        return self.records.tobytes(), self.words.tobytes()

    def __len__(self) -> int:
        return len(self.records)

    def first(self, count: int) -> Digests:
        """Return the digests of the first examples, `count` at most."""
        return self if len(self) <= count else Digests(self.records[:count], self.words)

    @property
    def keys(self) -> NDArray[np.uint64]:
        """64 bits of each text without regard to case and white space."""
        keys: NDArray[np.uint64] = self.records["key"]
        return keys

    def marked(self, check: str) -> NDArray[np.int64]:
        """Return the examples in which the check of texts called `check` found something."""
        bit = np.uint32(1 << list(TEXT_CHECKS).index(check))
        return np.flatnonzero(self.records["marks"] & bit)


_NO_WORDS = np.zeros(0, dtype=np.uint32)
NO_DIGESTS = Digests(np.zeros(0, dtype=_RECORD), _NO_WORDS)


def words_path(path: Path) -> Path:
    """Return where the words lie of the digests at `path`."""
    return path.with_suffix(".words")


def _words(folded: str) -> list[int]:
    some = folded[:_LONGEST]
    found = some.translate(_TO_SPACES).split() if some.isascii() else _WORD.findall(some)
    return list(map(_hashes.__getitem__, found[:MOST_WORDS]))


def _key(folded: str) -> int:
    text = " ".join(folded.split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


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
