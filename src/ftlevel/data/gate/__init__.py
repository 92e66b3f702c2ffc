"""Data checks on encoded rows, run before training.

A check returns the rows it flags and never changes a row; `config.gate` selects the action. Every
check is linear in the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ftlevel.config.gate import CHECKS, Action, GateConfig
from ftlevel.errors import join_names

MAX_SHOWN = 3
_WHOLE_SET = ("one_class", "one_answer", "length_bias", "one_verdict")


@dataclass(frozen=True)
class Finding:
    """Result of a data check that flagged rows of a split.

    Attributes:
        name: the check, a field of `config.gate`.
        places: `file:line` of the first few rows, some with a description.
        action: stop, drop, fold (merge label variants) or warn.
    """

    name: str
    split: str
    count: int
    total: int
    places: tuple[str, ...]
    action: Action

    @property
    def title(self) -> str:
        """Short description of the problem."""
        return CHECKS[self.name].title

    def __str__(self) -> str:
        places, more = join_names(self.places), self.count - len(self.places)
        if more and self.name not in _WHOLE_SET:
            places += f" and {more:,} more"
        places = f" ({places})" if self.places else ""
        return f"{self.title}: {self.count:,} of {self.total:,} {self.split} rows{places}"

    @property
    def setting(self) -> str:
        """The option that sets the action, with the other actions."""
        allowed = getattr(GateConfig.model_fields[self.name].annotation, "__args__", ())
        others = "|".join(action for action in allowed if action != self.action)
        return f"--set data.gate.{self.name}={others}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields for `summary.json` and `--json`."""
        return {**asdict(self), "places": list(self.places), "title": self.title}


def create_finding(
    name: str, split: str, count: int, total: int, places: Sequence[str], policy: GateConfig
) -> Finding | None:
    """Returns the finding of check `name`; None if `count` is 0 or `policy` ignores the check."""
    action: Action = getattr(policy, name)
    if not count or action == "ignore":
        return None
    return Finding(name, split, count, total, tuple(places[:MAX_SHOWN]), action)


def explain_stop(finding: Finding, advice: str = "pass") -> str:
    """Returns the error message for a finding that stops; `advice` is the verb before `--set`."""
    allowed = getattr(GateConfig.model_fields[finding.name].annotation, "__args__", ())
    others = " or ".join(action for action in allowed if action not in ("stop", "ignore"))
    remedy = CHECKS[finding.name].remedy or "Fix them"
    return f"{finding}. {remedy}, or {advice} --set data.gate.{finding.name}={others}."
