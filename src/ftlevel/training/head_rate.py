"""New heads learn at a rate of their own, by groups of the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


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
