"""How much a run trains, known before weights load."""

from __future__ import annotations

from typing import Any

from ftlevel.config import TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.methods import METHODS
from ftlevel.models.loading import build_task_model
from ftlevel.trained.adapt import apply_method
from ftlevel.training.plan.plan import Plan


def size_choices(config: TrainConfig, plan: Plan, *, try_method: bool) -> list[Choice]:
    """Return the lines of the trained parameters and of the steps. See `count_trainable`."""
    epochs = f"{config.train.num_train_epochs:g} epochs"
    reason = "" if config.train.max_steps else f"{epochs} of {len(plan.data.train):,} rows"
    trainable, total = count_trainable(config, plan, try_method=try_method)
    return [
        Choice("trainable", f"{trainable:,} of {total:,}", f"{trainable / total:.2%}"),
        Choice("steps", f"{plan.schedule.steps:,}", reason),
    ]


def count_trainable(
    config: TrainConfig, plan: Plan, *, try_method: bool = False
) -> tuple[int, int]:
    """Return how many parameters are trained and how many the model has, without its weights.

    Where the method can say, it is asked: to put an adapter onto every module of the model's shape
    takes as long as onto the model itself.

    Args:
        config: the whole configuration.
        plan: its plan.
        try_method: put the method onto the shape in any case, as nothing will be after a dry run.
    """
    method, own, total = config.method, METHODS[config.method.kind], plan.model.total_parameters
    if own.count and not (try_method or plan.base.heads or plan.targets.parameters):
        added = own.count(method, plan.targets.sizes)
        if added is not None:
            return added, total + added
    meta = build_task_model(plan.model.config, plan.model.auto_class)
    adapted = apply_method(meta, own.start.default(method) if own.start else method, plan.base)
    return count_parameters(adapted)


def count_parameters(model: Any) -> tuple[int, int]:
    """Return how many parameters of `model` are trained and how many it has, each counted once.

    PEFT trains a copy of a head and keeps the head as it was beside it, which counts no more.
    """
    from peft.utils import ModulesToSaveWrapper

    kept = tuple(f"{name}.original_module." for name, module in model.named_modules()
                 if isinstance(module, ModulesToSaveWrapper))  # fmt: skip
    named = model.named_parameters(remove_duplicate=False)
    own = {id(p): p for name, p in named if not name.startswith(kept)}.values()
    return sum(p.numel() for p in own if p.requires_grad), sum(_count(p) for p in own)


def _count(parameter: Any) -> int:
    """Return how many numbers `parameter` stands for; 4-bit weights hold two a byte."""
    packed = type(parameter).__name__ == "Params4bit" or hasattr(parameter, "quant_state")
    return parameter.numel() * (2 if packed else 1)
