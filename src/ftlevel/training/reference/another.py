"""The reference of preferences that another run, adapter or model is: asked, and let go.

It goes through the rows before the weights of the run load, so that no two models are in memory.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ftlevel.config import TrainConfig
from ftlevel.events import Listener
from ftlevel.fast.plan.fast_plan import plan_forward
from ftlevel.trained.another import Another
from ftlevel.trained.load import load_found
from ftlevel.training.fast_step import speed_up
from ftlevel.training.model import Adapted
from ftlevel.training.plan.plan import Plan
from ftlevel.training.reference.fill import Reference, fill_rows, needs_reference
from ftlevel.workspace import Workspace


def ask_reference(
    config: TrainConfig, plan: Plan, listener: Listener
) -> tuple[Plan, Reference | None]:
    """Return the plan with rows that know what another model says of them, where one is named.

    Args:
        config: the whole configuration.
        plan: of the run.
        listener: told of it.
    """
    another = plan.beside.reference
    if another is None or not needs_reference(plan):
        return plan, None
    listener.stage("ask the reference")
    preference = config.preference
    weighting = preference.ld_alpha if preference.loss == "ld-dpo" else None
    cut = [plan.fast.prefix_tree, plan.fast.tokens]  # as the policy's rows, rounded alike
    key = json.dumps([describe_asking(another, plan), cut, weighting])
    with contextlib.ExitStack() as held:
        ask = functools.cache(lambda: held.enter_context(loaded(another, plan, listener)))
        plan, facts = fill_rows(config, plan, another.name, key, ask, listener)
    kept = Workspace("reference")
    beside = (config.output.dir or Path("runs/run")) / "adapter"
    another.write(Path(kept.name), beside)
    return plan, Reference({**facts, "fingerprint": another.fingerprint}, kept)


def describe_asking(another: Another, plan: Plan) -> dict[str, object]:
    """Return all that decides what `another` says of a row."""
    fast = plan.fast
    return {
        "model": another.fingerprint,
        "precision": [plan.model.device, plan.model.dtype],
        "packs": fast.enabled and fast.packs,
        "versions": torch.__version__,
    }


@contextlib.contextmanager
def loaded(another: Another, plan: Plan, listener: Listener) -> Iterator[tuple[Plan, Adapted]]:
    """Give the plan by which `another` computes the rows of `plan`, and its model, in the block."""
    trained = load_found(another.found, plan.model.device)
    forward = plan_forward(
        trained.model, trained.kind, trained.method, plan.objective, plan.fast.tokens
    )
    forward = replace(forward, enabled=plan.fast.enabled,
                      prefix_tree=forward.packs and plan.fast.prefix_tree)  # fmt: skip
    asking = replace(plan, fast=forward, model=replace(plan.model, dtype=trained.dtype))
    fast = speed_up(trained.model, asking, listener)
    try:
        yield asking, Adapted(trained.model, {}, fast, {})
    finally:
        if fast is not None:
            fast.remove()
        del trained, fast
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
