"""Default learning rates by method, model width and number of steps, and the rate of new heads.

    rate = narrow · (wide / narrow)^t,  t = ½ ln(width / 384) / ln(4096 / 384)
                                          + ½ ln(steps / 100) / ln(3000 / 100),

with both terms of t clipped to [0, ½] and the rate rounded to one digit. `narrow` is measured on
small models in short runs (docs/defaults.md); `wide` is from papers, for large models and thousands
of steps. The method modules have the values. Does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ftlevel.config.section import Choice

if TYPE_CHECKING:
    import torch


NARROW, SHORT = 384, 100  # features and steps of the measurements
WIDE, LONG = 4096, 3000
TOKEN_HEAD = 3
"""Rate factor for tasks with a target per token, measured on token classification.

With one or two targets per row, most methods do not learn at this rate.
"""
_ARTICLES = {"encoder": "an", "decoder": "a", "encoder-decoder": "an"}


@dataclass(frozen=True)
class RateFacts:
    """Properties of a run that determine its learning rate.

    `deep_head` means a new head with more than one layer, `token_head` one with a target per token.
    """

    kind: str
    width: int
    new_head: bool
    steps: int
    deep_head: bool = False
    token_head: bool = False

    def __str__(self) -> str:
        """Such as `an encoder of hidden size 384 with a new head for tokens and 100 steps`."""
        head = " with a new head" if self.new_head else ""
        head += " for tokens" if self.token_head else ""
        model = f"{_ARTICLES[self.kind]} {self.kind} of hidden size {self.width:,}{head}"
        return f"{model} and {self.steps:,} step{'s' * (self.steps != 1)}"

    @property
    def size(self) -> float:
        """Size of model and run, from 0 (as measured) to 1 (as in papers)."""
        return (_between(self.width, NARROW, WIDE) + _between(self.steps, SHORT, LONG)) / 2


def _between(value: int, low: int, high: int) -> float:
    """Returns where log `value` is between log `low` (0) and log `high` (1), clipped."""
    return min(max(math.log(max(value, 1) / low) / math.log(high / low), 0.0), 1.0)


@dataclass(frozen=True)
class Rates:
    """Peak learning rates of a method.

    Attributes:
        narrow: measured on small models in short runs, with one or two targets per row.
        wide: for large models in long runs.
        source: source of `wide`.
        kinds: type of model -> rate measured with its pretrained language head.
        tokens: rate measured with a target per token; None uses `TOKEN_HEAD`.
        is_heads: whether only heads are trained; a target per token does not change their rate.
    """

    narrow: float
    wide: float
    source: str
    kinds: Mapping[str, float] = field(default_factory=dict)
    tokens: float | None = None
    is_heads: bool = False

    def rate(self, run: RateFacts) -> float:
        """Returns the rate of a run, rounded to one digit."""
        narrow = self.measured(run)
        return float(f"{narrow * (self.wide / narrow) ** run.size:.0e}")

    def measured(self, run: RateFacts) -> float:
        """Returns the rate measured on small models for the head and model type of `run`."""
        rate = self.narrow if run.new_head else self.kinds.get(run.kind, self.narrow)
        if run.token_head and not self.is_heads:
            return min(rate * TOKEN_HEAD, 1.0) if self.tokens is None else self.tokens
        return rate

    def choose(self, label: str, run: RateFacts, name: str = "learning rate") -> Choice:
        """Returns the rate with an explanation; `label` names the trained part, such as `lora`."""
        narrow = self.measured(run)
        if run.size == 0:
            message = "measured"
        elif run.size == 1:
            message = self.source
        else:
            message = f"{narrow:g} on short runs, {self.wide:g} on long ones, {self.source}"
        return Choice(name, self.rate(run), f"default for {label} on {run}; {message}")


HEAD = Rates(
    narrow=2e-2, wide=5e-4, source="what keeps a step on wide features as small", is_heads=True
)
"""Rates of a new linear head.

With one rate for all parameters, accuracy after 100 steps is up to ten points lower.
"""
DEEP_HEAD = Rates(narrow=5e-3, wide=1e-4, source=HEAD.source, is_heads=True)
"""Rates of a new head with several layers, such as RoBERTa's, whose tanh saturates."""


def choose_head_rate(run: RateFacts) -> Choice:
    """Returns the rate of a new head, with an explanation."""
    rates, label = (DEEP_HEAD, "a deep head") if run.deep_head else (HEAD, "a linear head")
    return rates.choose(label, run, "head learning rate")


@dataclass(frozen=True)
class HeadRate:
    """Peak learning rate of randomly initialized heads; `modules` are names in the base model."""

    modules: Sequence[str]
    rate: float


def set_head_rate(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, heads: HeadRate
) -> None:
    """Move the heads' parameters into parameter groups with their rate (`optimizer` is modified).

    Must run before the scheduler is created. New groups copy all other options, such as weight
    decay. Idempotent.
    """
    inside = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if any(f".{module}." in f".{name}" for module in heads.modules)
    }
    for group in list(optimizer.param_groups):
        head_parameters = [parameter for parameter in group["params"] if id(parameter) in inside]
        if not head_parameters:
            continue
        others = [parameter for parameter in group["params"] if id(parameter) not in inside]
        if others:
            group["params"] = others
            group = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group({**group, "params": head_parameters, "lr": heads.rate})
        else:
            group["lr"] = heads.rate


__all__ = ["HeadRate", "RateFacts", "Rates", "choose_head_rate", "set_head_rate"]
