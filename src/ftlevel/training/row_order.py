"""The rows of a run and the order in which the Trainer takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from ftlevel.config import TrainConfig
from ftlevel.data.prepare.row_stream import Division
from ftlevel.data.prepare.sampling import LengthGroups, RowsAndNothing, ShareOfSteps
from ftlevel.data.prepare.streamed_rows import InOrder, StreamedRows
from ftlevel.models.upstream.data import shared_order
from ftlevel.training.plan.plan import Plan
from ftlevel.training.processes import Processes


def rows_and_order(
    config: TrainConfig, plan: Plan, arguments: Any, processes: Processes
) -> tuple[Any, Sampler[int] | None]:
    """Return what is trained on, and the order of it; None is Trainer's random one.

    Args:
        config: the whole configuration.
        plan: the resolved facts.
        arguments: the `TrainingArguments`.
        processes: those of the run, each of which encodes its part of a stream.
    """
    if plan.data.stream is not None:
        together = arguments.train_batch_size * arguments.world_size
        step, stream = together * arguments.gradient_accumulation_steps, plan.data.stream
        if processes.count == 1:
            rows = StreamedRows(stream, step, arguments.max_steps)
        else:
            stream.divide(Division(processes.count, processes.world.rank, processes.exchange))
            rows = StreamedRows(stream, step, arguments.max_steps, together)
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


def shared_loader(
    rows: Any, order: Sampler[int], arguments: Any, collate: Callable[[list[Any]], dict[str, Any]]
) -> DataLoader[Any]:
    """Return the batches of one of several processes, as many as every other one has.

    Args:
        rows: that are trained on.
        order: that all processes share.
        arguments: the `TrainingArguments`.
        collate: makes a batch of rows; one that no row is left for says `is_nothing`.
    """
    share = ShareOfSteps(
        order, arguments.train_batch_size, arguments.world_size, arguments.process_index
    )

    def collate_or_nothing(some: list[Any]) -> dict[str, Any]:
        batch = collate(some)
        return {**batch, "is_nothing": True} if some[0].row < 0 else batch

    return DataLoader(RowsAndNothing(rows), batch_sampler=share, collate_fn=collate_or_nothing)
