"""Put the fast step onto a loaded model, prove it where that is asked for, and say what it did."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ftlevel.config import TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.events import Listener
from ftlevel.fast.step import FastStep
from ftlevel.training.plan.plan import Plan
from ftlevel.training.trainer import FtlevelTrainer
from ftlevel.training.verify import StepVerifier, Verified


def speed_up(
    model: Any, config: TrainConfig, plan: Plan, listener: Listener
) -> tuple[FastStep | None, Verified | None]:
    """Put the fast step onto `model` (mutated), and compare it with the plain one where asked.

    What the model turns out not to take is named, and done the plain way.
    """
    if not plan.fast.enabled:
        return None, None
    fast, pad_id = FastStep(model, plan.fast), plan.model.pad_id
    machine = plan.model.device, plan.model.dtype
    tried = (plan.data.train, pad_id, *machine)
    for reason in (*fast.check(*tried), fast.check_cross_entropy(plan.objective, *tried)):
        if reason:
            listener.warn(f"{plan.model.family}: {reason}.")
    fast.prune_last_layer(plan.objective, *tried)
    if not config.speed.verify:
        return fast, None
    listener.stage("compute the first steps the plain way and the fast way")
    rows = config.train.per_device_train_batch_size
    verify = StepVerifier(model, fast, plan.objective, pad_id, rows, *machine)
    verified = verify(plan.data.train, rows * config.train.gradient_accumulation_steps)
    apart = f"loss differs by {verified.loss:.1e}, gradients by {verified.gradient:.1e}, relative"
    listener.choices("verify-fast", [Choice(f"{verified.steps} steps", apart)])
    return fast, verified


def describe_speed(trainer: FtlevelTrainer, verified: Verified | None) -> dict[str, Any]:
    """Return what summary.json says of how the steps were computed."""
    if trainer.fast is None:
        return {"fast": False}
    plan = trainer.fast.plan
    return {
        "fast": True,
        "packed": plan.packs,
        "chunked_cross_entropy": plan.chunked_cross_entropy,
        "prefixes_shared": plan.prefix_tree,
        "fused_norms_and_glus": trainer.fast.norm_glu.count if trainer.fast.norm_glu else 0,
        "pruned_linears": trainer.fast.pruned_linears,
        "parallel_workers": plan.workers,
        "tokens_per_micro_batch": plan.tokens // plan.workers,
        "tokens_computed": trainer.tokens_computed,
        "tokens_in_rows": int(trainer.tokens_seen),
        "verified": asdict(verified) if verified else None,
    }
