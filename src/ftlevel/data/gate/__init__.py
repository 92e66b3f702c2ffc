"""A finding is data; what follows from it is the policy of `config.gate`, a table of fields.

The gate: what is wrong with encoded rows, found before a model sees them.

A check returns the rows in which it found something; `findings` turns that into data by the policy
of the configuration. No check changes a row, and none takes more than linear time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ftlevel.config.gate import CHECKS, Action, GateConfig
from ftlevel.data.gate.flat import Flat
from ftlevel.errors import listing

MOST_SHOWN = 3
_OF_ALL_ROWS = ("one_class", "one_answer", "length_bias", "one_verdict")


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with rows of a split.

    Attributes:
        name: of the check, a field of `config.gate`.
        split: train, validation or test.
        count: how many of the split's rows, as the data file counts them.
        total: how many it has.
        places: the first few, as `file:line`, some with what is wrong there.
        action: what is done: stop, drop, fold or warn.
    """

    name: str
    split: str
    count: int
    total: int
    places: tuple[str, ...]
    action: Action

    @property
    def title(self) -> str:
        """What is wrong, in a few words."""
        return CHECKS[self.name].title

    def __str__(self) -> str:
        """Say it in one line, without a full stop."""
        shown, more = listing(self.places), self.count - len(self.places)
        if more and self.name not in _OF_ALL_ROWS:
            shown += f" and {more:,} more"
        places = f" ({shown})" if self.places else ""
        return f"{self.title}: {self.count:,} of {self.total:,} {self.split} rows{places}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for summary.json and `--json`."""
        return {**asdict(self), "places": list(self.places), "title": self.title}


def judge(
    name: str, split: str, count: int, total: int, places: Sequence[str], policy: GateConfig
) -> Finding | None:
    """Return what was found with the action that `policy` wants; None if there is nothing to say.

    Args:
        name: of the check.
        split: where.
        count: rows that it found.
        total: rows of the split.
        places: the first few of them.
        policy: the gate section of the configuration.
    """
    action: Action = getattr(policy, name)
    if not count or action == "ignore":
        return None
    return Finding(name, split, count, total, tuple(places[:MOST_SHOWN]), action)


def explain_stop(finding: Finding) -> str:
    """Return the error for a finding whose action is stop: what, where, and the ways on."""
    allowed = GateConfig.model_fields[finding.name].annotation
    others = [a for a in getattr(allowed, "__args__", ()) if a not in ("stop", "ignore")]
    ways = " or ".join(others)
    remedy = CHECKS[finding.name].remedy or "Fix them"
    return f"{finding}. {remedy}, or pass --set data.gate.{finding.name}={ways}."


__all__ = ["Finding", "Flat", "explain_stop", "judge"]
