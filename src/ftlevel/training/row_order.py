"""The rows of a run and the order in which the Trainer takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Sampler

from ftlevel.config import TrainConfig
from ftlevel.data.prepare.sampling import LengthGroups
from ftlevel.data.prepare.streamed_rows import InOrder, StreamedRows
from ftlevel.models.upstream.data import shared_order
from ftlevel.training.plan.plan import Plan


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
    return plan.data.train, row_order(config, plan)


def row_order(config: TrainConfig, plan: Plan) -> Sampler[int] | None:
    """Return the order in which rows are taken, or None for Trainer's random one.

    Several processes share the order that Trainer would draw for one.
    """
    train = config.train
    if train.train_sampling_strategy == "random":
        if not train.num_processes:
            return None
        return shared_order()(
            plan.data.train, generator=torch.Generator(), data_seed=train.order_seed
        )
    step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    step *= train.num_processes or 1
    return LengthGroups([len(row.input_ids) for row in plan.data.train], step, train.order_seed)
