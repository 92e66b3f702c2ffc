"""New heads learn at a rate of their own: which, and how an optimizer is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftlevel.config.choices import Choice
from ftlevel.methods.rates.rule import Rates, RunFacts

if TYPE_CHECKING:
    import torch

HEAD = Rates(
    narrow=2e-2, wide=5e-4, source="what keeps a step on wide features as small", is_heads=True
)
"""Of a new head of one linear. One rate for all loses up to ten points of accuracy in 100 steps:
what brings a random head anywhere breaks the pretrained rest, and what that bears leaves the head
where it was."""
DEEP_HEAD = Rates(narrow=5e-3, wide=1e-4, source=HEAD.source, is_heads=True)
"""Of a new head with a layer below the last, as RoBERTa's or a new pooler: its tanh saturates."""


def choose_head_rate(known: RunFacts) -> Choice:
    """Return the rate of a new head, with its reason."""
    rates, what = (DEEP_HEAD, "a deep head") if known.deep_head else (HEAD, "a linear head")
    return rates.choose(what, known, "head learning rate")


@dataclass(frozen=True)
class HeadRate:
    """The rate of heads that begin at random.

    Attributes:
        modules: names in the base model.
        rate: at the peak.
    """

    modules: Sequence[str]
    rate: float


def set_head_rate(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, heads: HeadRate
) -> None:
    """Move the heads' parameters into groups with their rate (`optimizer` is mutated).

    What else a group says, as its weight decay, stays; a second call changes nothing.

    Args:
        optimizer: before its schedule is made, which multiplies the rate of every group.
        model: with the method on it; PEFT's names hold the base model's.
        heads: and their rate.
    """
    inside = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if any(f".{module}." in f".{name}" for module in heads.modules)
    }
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in inside]
        if not own:
            continue
        others = [parameter for parameter in group["params"] if id(parameter) not in inside]
        if others:
            group["params"] = others
            group = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group({**group, "params": own, "lr": heads.rate})
        else:
            group["lr"] = heads.rate
