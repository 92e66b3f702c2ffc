"""Put the fast step onto a loaded model, and say what it did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftlevel.events import Listener
from ftlevel.fast.kernels import describe_choices
from ftlevel.fast.step import FastStep
from ftlevel.training.plan.plan import Plan
from ftlevel.training.trainer import FtlevelTrainer


def speed_up(model: Any, plan: Plan, listener: Listener) -> FastStep | None:
    """Put the fast step onto `model` (mutated).

    What the model turns out not to take is named, and done the plain way.
    """
    if not plan.fast.enabled:
        return None
    fast = FastStep(model, plan.fast)
    tried = (plan.data.train, plan.model.pad_id, plan.model.device, plan.model.dtype)
    for reason in (*fast.check(*tried), fast.check_cross_entropy(plan.objective, *tried)):
        if reason:
            listener.warn(f"{plan.model.family}: {reason}.")
    fast.prune_last_layer(plan.objective, *tried)
    return fast


def describe_speed(trainer: FtlevelTrainer, verified: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what summary.json says of how steps were computed, and what was `verified` of them."""
    if trainer.fast is None:
        return {"fast": False}
    plan = trainer.fast.plan
    return {
        "fast": True,
        "packed": plan.packs,
        "chunked_cross_entropy": plan.chunked_cross_entropy,
        "prefixes_shared": plan.prefix_tree,
        "fused_norms_and_glus": trainer.fast.norm_glu.count if trainer.fast.norm_glu else 0,
        "triton_kernels": describe_choices(),
        "pruned_linears": trainer.fast.pruned_linears,
        "parallel_workers": plan.workers,
        "tokens_per_micro_batch": plan.tokens // plan.workers,
        "chosen_for_bytes": plan.memory or None,
        "made_smaller_for_memory": trainer.smaller.done,
        "tokens_computed": trainer.tokens_computed,
        "tokens_in_rows": int(trainer.tokens_seen),
        "verified": verified,
    }
