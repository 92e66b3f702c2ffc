"""Default learning rates by method, model width and number of steps, and the rate of new heads.

    rate = small · (large / small)^t,  t = ½ ln(width / 384) / ln(4096 / 384)
                                          + ½ ln(steps / 100) / ln(3000 / 100),

with both terms of t clipped to [0, ½] and the rate rounded to one digit. `small` is measured on
small models in short runs (docs/defaults.md); `large` is from papers, for large models and
thousands of steps. The method modules have the values. Does not import torch.
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
class RateInputs:
    """Properties of a run that determine its learning rate.

    Attributes:
        architecture: `encoder`, `decoder` or `encoder-decoder`.
        width: hidden size.
        new_head: whether the head is randomly initialized.
        steps: number of optimizer steps.
        deep_head: whether the new head has several layers.
        token_head: whether the new head has a target per token.
    """

    architecture: str
    width: int
    new_head: bool
    steps: int
    deep_head: bool = False
    token_head: bool = False

    def __str__(self) -> str:
        head = " with a new head" if self.new_head else ""
        head += " for tokens" if self.token_head else ""
        name = self.architecture
        model = f"{_ARTICLES[name]} {name} of hidden size {self.width:,}{head}"
        return f"{model} and {self.steps:,} step{'s' * (self.steps != 1)}"

    @property
    def size(self) -> float:
        """Number from 0 (small model, short run) to 1 (large model, long run): t in the formula."""
        return (_between(self.width, NARROW, WIDE) + _between(self.steps, SHORT, LONG)) / 2


def _between(value: int, low: int, high: int) -> float:
    return min(max(math.log(max(value, 1) / low) / math.log(high / low), 0.0), 1.0)


@dataclass(frozen=True)
class Rates:
    """Default peak learning rates of a method, from which `rate` computes that of a run.

    Attributes:
        small: for small models in short runs, measured with one or two targets per row.
        large: for large models in long runs.
        source: paper or library that gives `large`.
        by_architecture: values that replace `small`, by architecture, if the head is pretrained.
        tokens: replaces `small` if rows have a target per token; None: `small` times `TOKEN_HEAD`.
        is_heads: whether only heads are trained; a target per token does not change their rate.
    """

    small: float
    large: float
    source: str
    by_architecture: Mapping[str, float] = field(default_factory=dict)
    tokens: float | None = None
    is_heads: bool = False

    def rate(self, inputs: RateInputs) -> float:
        """Returns the learning rate for a run, rounded to one digit."""
        small = self.small_rate(inputs)
        return float(f"{small * (self.large / small) ** inputs.size:.0e}")

    def small_rate(self, inputs: RateInputs) -> float:
        """Returns the rate that a run would have with a small model and few steps."""
        rate = (
            self.small
            if inputs.new_head
            else self.by_architecture.get(inputs.architecture, self.small)
        )
        if inputs.token_head and not self.is_heads:
            return min(rate * TOKEN_HEAD, 1.0) if self.tokens is None else self.tokens
        return rate

    def get_choice(self, label: str, inputs: RateInputs, name: str = "learning rate") -> Choice:
        """Returns the setting `name`: the rate and its reason; `label` is what it trains."""
        small = self.small_rate(inputs)
        if inputs.size == 0:
            message = "measured"
        elif inputs.size == 1:
            message = self.source
        else:
            message = f"{small:g} on short runs, {self.large:g} on long ones, {self.source}"
        return Choice(name, self.rate(inputs), f"default for {label} on {inputs}; {message}")


HEAD = Rates(
    small=2e-2, large=5e-4, source="scaled so that steps on wide features stay small", is_heads=True
)
"""Rates of a new linear head.

With one rate for all parameters, accuracy after 100 steps is up to ten points lower.
"""
DEEP_HEAD = Rates(small=5e-3, large=1e-4, source=HEAD.source, is_heads=True)
"""Rates of a new head with several layers, such as RoBERTa's, whose tanh saturates."""


def get_head_rate(inputs: RateInputs) -> Choice:
    """Returns the default learning rate of a randomly initialized head, with the reason for it."""
    rates, label = (DEEP_HEAD, "a deep head") if inputs.deep_head else (HEAD, "a linear head")
    return rates.get_choice(label, inputs, "head learning rate")


@dataclass(frozen=True)
class HeadRate:
    """Learning rate of randomly initialized heads; `modules` are their module names in the base."""

    modules: Sequence[str]
    rate: float


def set_head_rate(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, heads: HeadRate
) -> None:
    """Give the heads' parameters their own parameter groups in `optimizer`, with `heads.rate`.

    Must run before the scheduler is created. New groups copy all other options, such as weight
    decay. Idempotent.
    """
    head_ids = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if any(f".{module}." in f".{name}" for module in heads.modules)
    }
    for group in list(optimizer.param_groups):
        head_parameters = [parameter for parameter in group["params"] if id(parameter) in head_ids]
        if not head_parameters:
            continue
        remaining = [parameter for parameter in group["params"] if id(parameter) not in head_ids]
        if remaining:
            group["params"] = remaining
            group = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group({**group, "params": head_parameters, "lr": heads.rate})
        else:
            group["lr"] = heads.rate
