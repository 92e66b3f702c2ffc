"""What the prompts and the answers of a whole set tell of one another, by their digests."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ftlevel.data.gate.digests import Digests
from ftlevel.data.gate.duplicates import find_repeated
from ftlevel.data.gate.flat import Integers
from ftlevel.data.gate.similarity import mix
from ftlevel.data.gate.wordings import Index

ONE_ANSWER_SHARE = 0.95
_FEW_ROWS = 10
_SAMPLE = 1_000
_BUCKETS = 1 << 16
_WORDS = 200  # of the first of a side, which are looked at
_CLEAR = 10.0  # nats
_BEYOND = 0.2


def find_conflicts(digests: Digests) -> tuple[Integers, Integers]:
    """Return the examples with the prompt of an earlier one and another answer, and which."""
    records = digests.records
    if records["before"].all():
        again, first = find_repeated(records["before"])
    else:
        asking = np.flatnonzero(records["before"])
        again, first = find_repeated(records["before"][asking])
        again, first = asking[again], asking[first]
    other = records["last"][again] != records["last"][first]
    return again[other], first[other]


def find_one_answer(digests: Digests) -> Integers:
    """Return the examples with the answer that nearly all have; none where there is no such."""
    records = digests.records
    answers = records["last"]
    if len(answers) < _FEW_ROWS or not records["before"].all():
        return np.zeros(0, dtype=np.int64)
    values, counts = np.unique(answers[:: -(-len(answers) // _SAMPLE)], return_counts=True)
    hit = np.flatnonzero(answers == values[np.argmax(counts)])
    return hit if len(hit) >= ONE_ANSWER_SHARE * len(answers) else hit[:0]


def find_swapped(digests: Digests) -> Integers:
    """Return the examples whose prompt and answer would fit the other rows the other way round.

    A naive Bayes of the words of all other rows' prompts against those of their answers scores
    both sides. Where a set's prompts and answers are told apart by it, by 10 nats in half of the
    rows, a row that is as clearly on the wrong side is one.
    """
    index = Index.of(digests)
    words = np.zeros((2, _BUCKETS))
    for begin, end in index.spans():
        bucket, side, _ = _sides(index, begin, end)
        for k in (0, 1):
            words[k] += np.bincount(bucket[side == k], minlength=_BUCKETS)
    score = np.zeros(len(index))
    for begin, end in index.spans():
        bucket, side, row = _sides(index, begin, end)
        asked = words[0][bucket] - (side == 0)
        answered = words[1][bucket] - (side == 1)
        for_asked = np.log(asked + 0.5) - np.log(answered + 0.5)
        weight = np.where(asked + answered > 0, np.where(side == 0, for_asked, -for_asked), 0)
        score[begin:end] = np.bincount(row, weight, minlength=end - begin)
    usual = float(np.median(score)) if len(score) else 0.0
    written = digests.records["before"] != 0
    if len(score) < _FEW_ROWS or usual < _CLEAR:
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero((score < -_BEYOND * usual) & written)


def _sides(index: Index, begin: int, end: int) -> tuple[Integers, NDArray[np.int64], Integers]:
    """Return the words of some rows, each once a side: bucket, 0 if asked and 1 if answered, row.

    Rows are counted from `begin`.
    """
    starts = index.starts[begin : end + 1]
    lengths = np.diff(starts)
    row = np.repeat(np.arange(end - begin), lengths)
    at = np.arange(len(row)) - np.repeat(starts[:-1] - starts[0], lengths)
    asked = np.repeat(index.digests.records["asked"][begin:end].astype(np.int64), lengths)
    side = (at >= asked).astype(np.int64)
    near = at - side * asked < _WORDS
    words = mix(np.asarray(index.digests.words[starts[0] : starts[-1]])[near])
    bucket = (words & np.uint32(_BUCKETS - 1)).astype(np.int64)
    packed = np.sort((row[near] * 2 + side[near]) * _BUCKETS + bucket)
    packed = packed[np.diff(packed, prepend=-1) != 0]
    return packed % _BUCKETS, packed // _BUCKETS % 2, packed // (2 * _BUCKETS)
