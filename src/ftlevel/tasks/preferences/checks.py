"""What the gate asks of judged answers: equal ones, contradictions, and what a length tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ftlevel.data.encoding.encode import Encoded
from ftlevel.tasks.preferences.formats import JudgedExample, PairExample, say
from ftlevel.tasks.preferences.rows import PairRow

if TYPE_CHECKING:
    from ftlevel.data.gate.flat import Mask

BIASED = 0.8
"""Share of pairs from which on a judge of length alone does too well, or too badly."""
FEWEST = 20
"""Pairs below which such a share says little."""


def look_at_pairs(rows: Sequence[Encoded]) -> Mapping[str, Mask]:
    """Return the pairs of equal answers, and those that an earlier one contradicts."""
    import numpy as np

    equal, against = np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
    seen: set[tuple[bytes, bytes]] = set()
    for index, row in enumerate(rows):
        if not isinstance(row, PairRow):
            continue
        first, second = (
            np.array(branch.labels if row.is_apart else branch.input_ids, np.int32).tobytes()
            for branch in _whole(row)
        )
        if row.is_apart:
            source = np.array(row.input_ids, np.int32).tobytes()
            first, second = source + b"|" + first, source + b"|" + second
        equal[index] = first == second
        against[index] = (second, first) in seen and not equal[index]
        seen.add((first, second))
    return {"equal_answers": equal, "contradicting_pairs": against}


def _whole(row: PairRow) -> Sequence[Encoded]:
    return PairRow.branches.fget(row)  # type: ignore[attr-defined] # also where labels are scores


def judge_answers(examples: Sequence[Any], loss: str) -> Sequence[tuple[str, int, str]]:
    """Return (check of the gate, examples with it, what it is) for the set as a whole."""
    pairs = [example for example in examples if isinstance(example, PairExample)]
    found: list[tuple[str, int, str]] = []
    if pairs:
        found += _length_bias(pairs)
        scored = [pair for pair in pairs if len(pair.scores) > 1]
        worse = [pair for pair in scored if pair.scores[0] <= pair.scores[1]]
        if worse:
            told = f"row {worse[0].row + 1}: {worse[0].scores[0]:g} against {worse[0].scores[1]:g}"
            found.append(("scores_disagree", len(worse), told))
        leaks = [pair for pair in pairs if _repeats(pair)]
        if leaks:
            found.append(("prompt_in_answer", len(leaks), f"row {leaks[0].row + 1}"))
        return found
    judged = [example for example in examples if isinstance(example, JudgedExample)]
    good = sum(example.desirable for example in judged)
    if judged and good in (0, len(judged)):
        word = "desirable" if good else "undesirable"
        found.append(("one_verdict", len(judged), f"all are {word}, and --loss {loss} needs both"))
    return found


def _length_bias(pairs: Sequence[PairExample]) -> list[tuple[str, int, str]]:
    """Return how well a judge of length alone would do, where that is too well or too badly."""
    sizes = [(len(say(pair.chosen)), len(say(pair.rejected))) for pair in pairs]
    longer = sum(a > b for a, b in sizes)
    share = (longer + sum(a == b for a, b in sizes) / 2) / len(pairs)
    if len(pairs) < FEWEST or 1 - BIASED < share < BIASED:
        return []
    way = "longer" if share >= BIASED else "shorter"
    count = longer if share >= BIASED else len(pairs) - longer
    told = (
        f"a judge of length alone, for the {way} one, would be right in {max(share, 1 - share):.0%}"
    )
    return [("length_bias", count, told)]


def _repeats(pair: PairExample) -> bool:
    """Whether an answer begins with all that the last turn asked, three words or more."""
    asked = pair.prompt[-1].content.strip()
    return len(asked.split()) > 2 and any(
        say(answer).strip().startswith(asked) for answer in (pair.chosen, pair.rejected)
    )
