"""The Trainer of a run, and what watches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config import TrainConfig
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.prepare.streamed_rows import StreamedRows
from ftlevel.events import Listener
from ftlevel.fast.step_collator import StepCollator
from ftlevel.methods import METHODS
from ftlevel.methods.rates import HeadRate
from ftlevel.training.arguments import build_arguments, build_evaluator
from ftlevel.training.callbacks.gradient_proof import GradientProof
from ftlevel.training.callbacks.interrupt import Interrupt
from ftlevel.training.callbacks.report import Report
from ftlevel.training.callbacks.save_stream_state import SaveStreamState
from ftlevel.training.callbacks.set_epoch import SetEpoch
from ftlevel.training.callbacks.write_manifest import WriteManifest
from ftlevel.training.model import Adapted
from ftlevel.training.plan.plan import Plan
from ftlevel.training.processes import Processes
from ftlevel.training.row_order import rows_and_order
from ftlevel.training.trainer import FtlevelTrainer


def build_trainer(
    config: TrainConfig, plan: Plan, adapted: Adapted, run: RunDirectory, checkpoint: Path | None
) -> FtlevelTrainer:
    """Return the Trainer of the run, without any of the libraries' own printing.

    Args:
        config: the whole configuration.
        plan: its plan.
        adapted: what is trained.
        run: where checkpoints go.
        checkpoint: where a stream goes on; None where the run begins.
    """
    from transformers import PrinterCallback, ProgressCallback

    arguments = build_arguments(config, plan, run.checkpoints)
    arguments.eval_on_start &= checkpoint is None  # a run begins once
    rows, order = rows_and_order(config, plan, arguments)
    fast, pad_id = adapted.fast, plan.model.pad_id
    trainer = FtlevelTrainer(
        objective=plan.objective,
        loss=plan.loss,
        evaluator=build_evaluator(config, plan),
        model=adapted.model,
        args=arguments,
        optimizers=(build_optimizer(config, adapted.model, arguments), None),
        penalty=METHODS[config.method.kind].penalty,
        train_dataset=rows,
        eval_dataset=plan.data.validation or None,
        data_collator=StepCollator(pad_id, fast.plan) if fast else Collator(pad_id),
        fast=fast,
        order=order,
        head_rate=resolve_head_rate(plan),
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    if isinstance(rows, StreamedRows) and checkpoint:
        rows.restore(checkpoint)
    return trainer


def build_optimizer(config: TrainConfig, model: Any, arguments: Any) -> Any:
    """Return the method's own optimizer, if it has one; None leaves the choice to Trainer."""
    build = METHODS[config.method.kind].optimizer
    return build(config.method, model, arguments) if build else None


def resolve_head_rate(plan: Plan) -> HeadRate | None:
    """Return the rate of new heads where they have one of their own."""
    rate = plan.schedule.head_learning_rate
    if rate is None or rate == plan.schedule.learning_rate:
        return None
    return HeadRate(plan.model.new_heads, rate)


@dataclass(frozen=True)
class Watch:
    """The callbacks that are asked when the run is over."""

    report: Report
    gradients: GradientProof
    interrupt: Interrupt


def add_callbacks(
    trainer: FtlevelTrainer,
    config: TrainConfig,
    plan: Plan,
    run: RunDirectory,
    listener: Listener,
    processes: Processes,
) -> Watch:
    """Let everything that goes with the steps of `trainer` (mutated) go with them."""

    def tell_nobody(_: Mapping[str, Any]) -> None:
        """The first process writes for all."""

    is_first, rows = processes.is_first, trainer.train_dataset
    report = Report(
        listener, run.log if is_first else tell_nobody, lambda: int(trainer.tokens_seen)
    )
    watch = Watch(report, GradientProof(listener), Interrupt(processes, plan.model.device))
    own = METHODS[config.method.kind].callbacks
    streamed = isinstance(rows, StreamedRows)
    for callback in (
        watch.report,
        watch.gradients,
        watch.interrupt,
        SetEpoch(plan.data.train, trainer.order),
        *(own(config.method, run.checkpoints, is_first) if own else []),
        *([SaveStreamState(rows, run.checkpoints)] if streamed else []),
        WriteManifest(run.checkpoints, config.train.save_total_limit, processes),  # of all files
    ):
        trainer.add_callback(callback)
    return watch
