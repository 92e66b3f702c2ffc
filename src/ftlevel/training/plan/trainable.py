"""How many parameters a run trains, known before weights load."""

from __future__ import annotations

from ftlevel.config import TrainConfig
from ftlevel.methods import METHODS, Base
from ftlevel.models.loading import build_task_model
from ftlevel.trained.adapt import apply_method
from ftlevel.training.plan.resolve import Plan


def count_trainable(
    config: TrainConfig, plan: Plan, base: Base, *, try_method: bool = False
) -> tuple[int, int]:
    """Return how many parameters are trained and how many the model has, without its weights.

    Where the method can say, it is asked: to put an adapter onto every module of the model's shape
    takes as long as onto the model itself.

    Args:
        config: the whole configuration.
        plan: its plan.
        base: facts of the model.
        try_method: put the method onto the shape in any case, as nothing will be after a dry run.
    """
    method, own = config.method, METHODS[config.method.kind]
    if own.count and not (try_method or plan.heads or plan.parameters):
        added = own.count(method, plan.sizes)
        if added is not None:
            return added, plan.total_parameters + added
    meta = build_task_model(plan.model_config, plan.auto_class)
    if own.start:
        method = own.start.default(method)
    total = plan.total_parameters
    adapted = apply_method(meta, method, base)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return trained, total + trained if own.build else total
