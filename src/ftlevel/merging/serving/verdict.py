"""Whether an answer is the trained model's, its base's, or something else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ftlevel.merging.serving.answers import Answer
from ftlevel.merging.serving.client import Heard

TRAINED = "as trained"
EITHER = "as trained, and as the base"
BASE = "the base's answer"
ELSE = "something else"
_EXACT, _ROUNDED = 0.02, 0.1
_COARSEST = 0.5
_LARGEST_OF = {"float32": _EXACT, "f32": _EXACT,
               **dict.fromkeys(("q8_0", "q5_0", "q4_0"), _COARSEST)}  # fmt: skip


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


def widen(tolerance: float, heard: Sequence[Heard], base: Sequence[Answer]) -> float:
    """Return how far logprobs may be apart where the server rounds: twice what its base is off.

    A server that computes with a quantized base rounds activations too, by as much without an
    adapter as with one. So the base alone, on the same prompts, shows the size of the differences
    that rounding explains. A base that is off by more than the coarsest type explains is another
    model, and `tolerance` stays as it is.

    Args:
        tolerance: of weights in the recorded type.
        heard: what the server answers without the adapter.
        base: what the base must answer.
    """
    difference = max(_distance(one, known) for one, known in zip(heard, base, strict=True))
    return max(tolerance, 2 * difference) if difference <= _COARSEST else tolerance


def _distance(heard: Heard, known: Answer) -> float:
    """Return the largest difference of a logprob that tells `heard` from `known`.

    Where both choose another token, rounding has moved two logprobs by the margin between them.
    """
    if heard.ids is None or heard.logprobs is None:
        return 0.0
    pairs, is_whole = _aligned(heard, known)
    moved = [abs(heard.logprobs[one] - known.logprobs[other]) for one, other in pairs]
    common = len(pairs)
    if not is_whole and common < min(len(heard.ids), len(known.ids)):
        moved.append(known.margins[common] / 2)
    return max(moved, default=0.0)


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
        same = _plain(heard.text) == _plain(known.text)
        rows = list(zip(heard.logprobs or (), known.logprobs, strict=False)) if same else []
        far = max((abs(one - other) for one, other in rows), default=None)
        return same and (far is None or far <= tolerance), far, len(rows)
    pairs, whole = _aligned(heard, known)
    fits = whole or _part_rightly(heard, known, len(pairs), tolerance)
    logprobs = heard.logprobs
    if logprobs is None or not pairs:
        return fits, None, 0
    far = max(abs(logprobs[one] - known.logprobs[other]) for one, other in pairs)
    return fits and far <= tolerance, far, len(pairs)


def _part_rightly(heard: Heard, known: Answer, common: int, tolerance: float) -> bool:
    """Whether both go on alike after `common` tokens, but for what rounding may change."""
    if common == len(known.ids):
        return True
    if common == len(heard.ids or ()):  # servers leave out the token that ends an answer
        return common == len(known.ids) - 1
    if known.margins[common] >= 2 * tolerance:
        return False
    if heard.logprobs is None:
        return common > 0
    second = known.logprobs[common] - known.margins[common]
    return abs(heard.logprobs[common] - second) <= tolerance


def _aligned(heard: Heard, known: Answer) -> tuple[list[tuple[int, int]], bool]:
    """Return which token of one is which of the other, and whether all that was heard is there.

    llama.cpp leaves tokens out of its list that end inside a character; the text is whole then but
    for that character.
    """
    ids = heard.ids or []
    pairs, at = [], 0
    for other, token in enumerate(known.ids):
        if at < len(ids) and ids[at] == token:
            pairs.append((at, other))
            at += 1
    if at == len(ids) < len(known.ids) and _plain(heard.text) == _plain(known.text):
        return pairs, True
    common = 0
    while common < min(len(ids), len(known.ids)) and ids[common] == known.ids[common]:
        common += 1
    return [(index, index) for index in range(common)], False


def _plain(text: str) -> str:
    """Return a text without characters that were cut in two, which programs show differently."""
    return "".join(c for c in text if c != "\ufffd" and (c.isprintable() or c.isspace())).strip()
