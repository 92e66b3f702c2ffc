"""Whether an answer is the trained model's, its base's, or something else."""

from __future__ import annotations

from dataclasses import dataclass

from ftlevel.merging.serving.answers import Answer
from ftlevel.merging.serving.client import Heard

TRAINED = "as trained"
EITHER = "as trained, and as the base"
BASE = "the base's answer"
ELSE = "something else"
_EXACT, _ROUNDED = 0.02, 0.1
_LARGEST_OF = {"float32": _EXACT, "f32": _EXACT, "q8_0": 0.5}


@dataclass(frozen=True)
class Verdict:
    """What one answer was.

    Attributes:
        word: whose it is.
        difference: the largest, of a logprob, from the trained model's up to where they part; None
            where nothing could be compared.
        tokens: over how many tokens.
    """

    word: str
    difference: float | None
    tokens: int


def tolerance_of(dtype: str) -> float:
    """Return how far logprobs may be apart where weights are served in `dtype`."""
    return _LARGEST_OF.get(dtype, _ROUNDED)


def judge(heard: Heard, trained: Answer, base: Answer | None, tolerance: float) -> Verdict:
    """Say whose answer was heard."""
    fits, difference, tokens = _beside(heard, trained, tolerance)
    fits_base = base is not None and _beside(heard, base, tolerance)[0]
    word = (EITHER if fits_base else TRAINED) if fits else (BASE if fits_base else ELSE)
    return Verdict(word, difference, tokens)


def _beside(heard: Heard, known: Answer, tolerance: float) -> tuple[bool, float | None, int]:
    """Return whether it is `known`, the largest difference of a logprob, and over how many tokens.

    Two right answers may part where the second likeliest token is nearer than two logprobs may be.
    """
    if heard.ids is None:
        # Without tokens only the text tells; logprobs belong to the same tokens if it is the same.
        same = heard.text.strip() == known.text.strip()
        found = heard.logprobs or []
        if not same or not found:
            return same, None, 0
        pairs = list(zip(found, known.logprobs, strict=False))
        far = max(abs(one - other) for one, other in pairs)
        return far <= tolerance, far, len(pairs)
    common = 0
    while common < min(len(heard.ids), len(known.ids)) and heard.ids[common] == known.ids[common]:
        common += 1
    parted = common < len(known.ids)
    ended = parted and common == len(heard.ids) and common == len(known.ids) - 1
    near = parted and known.margins[common] < 2 * tolerance
    fits = not parted or ended or near  # servers leave out the token that ends
    if heard.logprobs is None or common == 0:
        return fits, None, 0
    pairs = list(zip(heard.logprobs[:common], known.logprobs, strict=False))
    far = max(abs(one - other) for one, other in pairs)
    return fits and far <= tolerance, far, common
