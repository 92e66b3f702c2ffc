"""How many parallel workers compute a step's micro-batches, and why one where it could be more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ftlevel.config import TrainConfig
from ftlevel.fast.parallel_workers import MAX_WORKERS
from ftlevel.methods import METHODS
from ftlevel.models.families import lookup_family
from ftlevel.world import has_peers

FUNCTIONAL_DROPOUT = ("opt",)
"""Families that drop by a function, which has the process's generator, and not by a module."""


@dataclass(frozen=True)
class WorkerPlan:
    """How micro-batches are computed.

    Attributes:
        count: how many at once.
        random: what is drawn at random in them, empty for nothing.
        reason: for the screen, why it is one where it could be more.
    """

    count: int = 1
    random: str = ""
    reason: str = ""


def plan_workers(config: TrainConfig, meta: Any, device: str, packs: bool) -> WorkerPlan:
    """Return how many micro-batches are computed at once; `parallel_workers` says what must hold.

    Args:
        config: the configuration.
        meta: the model on the meta device.
        device: torch device type.
        packs: whether rows are packed: attention then draws from the worker's generator.
    """
    asked, threads = config.speed.parallel_workers, torch.get_num_threads()
    if device != "cpu" or threads == 1 or asked == 1:
        return WorkerPlan()
    if has_peers():
        return WorkerPlan(reason="each process has its own")
    random = find_randomness(config, meta, with_head=True)
    if reason := _writes_to_itself(config, meta) or _uses_global_generator(
        config, meta, random, packs
    ):
        return WorkerPlan(reason=reason)
    return WorkerPlan(min(threads, MAX_WORKERS if asked == "auto" else asked), random)


def _uses_global_generator(config: TrainConfig, meta: Any, random: str, packs: bool) -> str:
    """Return what is drawn from the process's generator; empty if nothing."""
    if not random or (
        packs and not config.train.recomputes and meta.config.model_type not in FUNCTIONAL_DROPOUT
    ):
        return ""
    return f"{random} is drawn at random, in order"


def _writes_to_itself(config: TrainConfig, meta: Any) -> str:
    """Return what a forward pass changes in the model, or may; empty if nothing."""
    method, family = config.method, meta.config.model_type
    if reason := METHODS[method.kind].step.workers(method):
        return reason
    if lookup_family(family) is None:
        return f"not tried with {family}"
    if _changes_rope(meta.config):
        return f"{family} changes its rotary embedding with the length"
    return ""


def _changes_rope(config: Any) -> bool:
    """Whether a forward pass writes to the model's rotary embedding (transformers 5)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(v for v in parameters.values() if isinstance(v, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def find_randomness(config: TrainConfig, meta: Any, with_head: bool = False) -> str:
    """Return what is random in the blocks, or in the whole model, by its name in its config.

    Args:
        config: the configuration.
        meta: the model on the meta device.
        with_head: whether what stands before a classifier counts.
    """
    for owner in (config.method.model_dump(), meta.config.to_dict()):
        for name, value in owner.items():
            if not (isinstance(value, float) and value > 0):
                continue
            is_random = "drop" in name or "jitter" in name
            if is_random and (with_head or not name.startswith(("classifier", "summary"))):
                return f"{name} {value:g}"
    return ""
