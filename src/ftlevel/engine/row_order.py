"""The rows of a run and the order in which the Trainer takes them."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Sampler

from ftlevel.config import TrainConfig
from ftlevel.data.sampling import LengthGroups
from ftlevel.engine.resolve import Plan
from ftlevel.engine.streamed_rows import InOrder, StreamedRows


def rows_and_order(
    config: TrainConfig, plan: Plan, arguments: Any
) -> tuple[Any, Sampler[int] | None]:
    """Return what is trained on, and the order of it; None is Trainer's random one.

    Args:
        config: the whole configuration.
        plan: the resolved facts.
        arguments: the `TrainingArguments`.
    """
    if plan.data.stream is not None:
        step = arguments.train_batch_size * arguments.gradient_accumulation_steps
        rows = StreamedRows(plan.data.stream, step * arguments.world_size, arguments.max_steps)
        return rows, InOrder(rows)
    train = config.train
    if train.train_sampling_strategy == "random":
        return plan.data.train, None
    step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    lengths = [len(row.input_ids) for row in plan.data.train]
    return plan.data.train, LengthGroups(lengths, step, train.seed)
