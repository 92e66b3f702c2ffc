"""The loss of who knows how often each answer is given, and sees no text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable


def entropy(answers: Iterable[Hashable]) -> float | None:
    """Return the entropy of the answers' frequencies in nats; None where there are none.

    No guess that is the same for every row has a lower mean cross entropy.
    """
    counts = Counter(answers)
    total = counts.total()
    if not total:
        return None
    return sum(count / total * math.log(total / count) for count in counts.values())


def mean_entropy(columns: Iterable[Iterable[Hashable]]) -> float | None:
    """Return the mean over several answers a row, each guessed apart."""
    found = [value for column in columns if (value := entropy(column)) is not None]
    return sum(found) / len(found) if found else None
