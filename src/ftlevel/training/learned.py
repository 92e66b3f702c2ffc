"""Whether a run learned anything, by its loss: below guessing, or below where it began."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from ftlevel.training.plan.plan import Plan

_ROWS = 10_000  # of which answers are counted
_MARGIN = 0.02  # share of a guess's loss within which a model has learned how often answers are


def find_nothing_learned(summary: Mapping[str, Any], plan: Plan) -> list[str]:
    """Return what is to be said of a loss that did not fall; nothing of a run too short to tell.

    A loss of classes, tags and spans is compared with that of guessing without reading, which it
    has to be 2 % below, any other with the first that were logged. Below four logged losses one
    batch would be compared with another.

    Args:
        summary: of the run, with the means of its first and last losses.
        plan: of the run.
    """
    window = summary["loss_window"]
    if window < 2:
        return []
    first, last = summary["loss_first"], summary["loss_last"]
    guess = plan.objective.guess_loss(list(itertools.islice(plan.data.train, _ROWS)))
    if last < (first if guess is None else guess * (1 - _MARGIN)):
        return []
    ended = f"the loss ended at {last:.3f} (mean of the last {window} that were logged)"
    than = (
        f"and began at {first:.3f}"
        if guess is None
        else f"and guessing by how often each answer is given, without reading, gives {guess:.3f}"
    )
    rate = plan.schedule.learning_rate
    advice = "a lower" if last > first + (summary["loss_first_spread"] or 0) else "a higher"
    return [
        f"{ended}, {than}: nothing was learned. Try {advice} --learning-rate than {rate:g}, or "
        "train longer (--num-train-epochs, --max-steps)."
    ]
