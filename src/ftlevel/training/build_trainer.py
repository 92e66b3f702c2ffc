"""The Trainer of a run, and what watches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlevel.artifacts.checkpoints import step_of
from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config import TrainConfig
from ftlevel.data.encoding.collate import CollatorWithRows
from ftlevel.data.prepare.streamed_rows import StreamedRows
from ftlevel.events import Listener
from ftlevel.fast.step_collator import StepCollator
from ftlevel.methods import METHODS
from ftlevel.methods.base import HasState
from ftlevel.methods.rates import HeadRate
from ftlevel.models.hardware import held_memory_bytes, uses_tf32, using_tf32
from ftlevel.training.arguments import build_arguments, build_evaluator
from ftlevel.training.callbacks.follow_settings import FollowSettings
from ftlevel.training.callbacks.gradient_proof import GradientProof
from ftlevel.training.callbacks.interrupt import Interrupt
from ftlevel.training.callbacks.keep_answers import MOST_ROWS, KeepAnswers
from ftlevel.training.callbacks.keep_best import KeepBest
from ftlevel.training.callbacks.recovery import Recovery
from ftlevel.training.callbacks.report import Report
from ftlevel.training.callbacks.save_by_clock import SMALL_CHECKPOINT, SaveByClock
from ftlevel.training.callbacks.save_stream_state import SaveStreamState
from ftlevel.training.callbacks.set_epoch import SetEpoch
from ftlevel.training.callbacks.write_manifest import WriteManifest
from ftlevel.training.disk import checkpoint_bytes
from ftlevel.training.going_on.resume import GoingOn
from ftlevel.training.memory.shards import is_sharded
from ftlevel.training.model import Adapted
from ftlevel.training.plan.plan import Plan
from ftlevel.training.plan.schedule import steps_an_epoch
from ftlevel.training.processes import Processes
from ftlevel.training.row_order import rows_and_order
from ftlevel.training.sharding.trainer import ShardedTrainer
from ftlevel.training.trainer import FtlevelTrainer


def build_trainer(
    config: TrainConfig,
    plan: Plan,
    adapted: Adapted,
    run: RunDirectory,
    going_on: GoingOn,
    processes: Processes,
) -> FtlevelTrainer:
    """Return the Trainer of the run, without any of the libraries' own printing.

    Args:
        config: the whole configuration.
        plan: its plan.
        adapted: what is trained.
        run: where checkpoints go.
        going_on: where from; nowhere where the run begins.
        processes: those of the run.
    """
    from transformers import PrinterCallback, ProgressCallback

    arguments = build_arguments(config, plan, run.checkpoints)
    checkpoint = going_on.checkpoint
    # A run begins once; but an evaluation that it was broken off in is made up for.
    arguments.eval_on_start &= checkpoint is None
    arguments.eval_on_start |= _owes_evaluation(going_on, config, plan, arguments)
    rows, order = rows_and_order(config, plan, arguments, processes)
    fast, pad_id = adapted.fast, plan.model.pad_id
    whole_steps = StepCollator(pad_id, fast.plan, plan.objective) if fast else None
    kind = ShardedTrainer if is_sharded(adapted.model) and processes.count > 1 else FtlevelTrainer
    trainer = kind(
        objective=plan.objective,
        loss=plan.loss,
        evaluator=build_evaluator(config, plan),
        model=adapted.model,
        args=arguments,
        optimizers=(build_optimizer(config, adapted.model, arguments), None),
        penalty=METHODS[config.method.kind].penalty,
        train_dataset=rows,
        eval_dataset=plan.data.validation or None,
        data_collator=whole_steps or CollatorWithRows(pad_id),
        fast=fast,
        order=order,
        head_rate=resolve_head_rate(plan),
        processes=processes,
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    if isinstance(rows, StreamedRows) and checkpoint:
        rows.restore(checkpoint)
    return trainer


def _owes_evaluation(going_on: GoingOn, config: TrainConfig, plan: Plan, arguments: Any) -> bool:
    steps, rows = plan.schedule.steps, len(plan.data.train)
    an_epoch = steps if plan.data.stream else steps_an_epoch(config.train, rows)
    return going_on.owes_evaluation(arguments.eval_strategy, an_epoch, steps)


def build_optimizer(config: TrainConfig, model: Any, arguments: Any) -> Any:
    """Return the method's own optimizer, if it has one; None leaves the choice to Trainer."""
    build = METHODS[config.method.kind].optimizer
    return build(config.method, model, arguments) if build else None


def products_of(config: TrainConfig, plan: Plan) -> AbstractContextManager[None]:
    """Return the context in which a run multiplies: in TF32, where it may and the GPU has it."""
    return using_tf32(uses_tf32(config.train.tf32, plan.model.device, plan.model.dtype))


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
    best: KeepBest | None
    answers: KeepAnswers


def go_on(
    trainer: FtlevelTrainer,
    watch: Watch,
    run: RunDirectory,
    going_on: GoingOn,
    processes: Processes,
) -> None:
    """Let `trainer` and `watch` (mutated) know what was until the checkpoint; forget the rest."""
    if going_on.checkpoint is None:
        return
    step = step_of(going_on.checkpoint)
    if processes.is_first:
        watch.report.records += run.rewind_log(step)
        run.rewind_notes(step)
    trainer.smaller.go_on([note for note in run.read_notes() if note["step"] <= step])
    if watch.best is not None:
        watch.best.go_on(step, going_on.past, has_new_length=going_on.has_new_length)


def add_callbacks(
    trainer: FtlevelTrainer,
    config: TrainConfig,
    plan: Plan,
    run: RunDirectory,
    listener: Listener,
    processes: Processes,
    checkpoint: Path | None,
    write_beside: Callable[[Path], None] | None,
) -> Watch:
    """Let everything of ours that goes with the steps of `trainer` (mutated) go with them.

    Args:
        trainer: before its first step.
        config: the whole configuration.
        plan: its plan.
        run: the run directory.
        listener: is told.
        processes: those of the run.
        checkpoint: from which the run goes on.
        write_beside: as of `WriteManifest`.
    """

    def tell_nobody(_: Mapping[str, Any]) -> None:
        """The first process writes for all."""

    is_first, rows = processes.is_first, trainer.train_dataset
    report = Report(
        listener,
        run.log if is_first else tell_nobody,
        lambda: int(trainer.tokens_seen),
        lambda: held_memory_bytes(plan.model.device),
    )
    build = METHODS[config.method.kind].callbacks
    own = build(config.method, run.checkpoints, is_first) if build else []
    states = [callback for callback in own if isinstance(callback, HasState)]
    best = None
    if plan.best is not None:
        best = KeepBest(plan.best, run.checkpoints, processes, states, listener)
    trainer.warn = listener.warn
    trainer.replaces_nonfinite = config.train.on_nonfinite != "stop"
    if is_first:
        trainer.note = run.note
    recovery = Recovery(trainer, config.train, run, processes, listener, checkpoint)
    gradients = GradientProof(
        listener,
        trainer.take_step_loss,
        recovery,
        scales=trainer.accelerator.scaler is not None,
        defers=plan.model.device == "cuda" and recovery.only_stops,
    )
    answers = KeepAnswers(plan.objective, best)
    if is_first and trainer.evaluator and len(trainer.evaluator.rows) <= MOST_ROWS:
        trainer.evaluator = replace(trainer.evaluator, begin_record=answers.begin)
    watch = Watch(report, gradients, Interrupt(processes), best, answers)
    streamed = isinstance(rows, StreamedRows)
    when_written = trainer.when_written if isinstance(trainer, ShardedTrainer) else None
    minutes = config.train.save_minutes if config.train.save_strategy != "no" else 0.0
    size = checkpoint_bytes(trainer.model, config.train.optim)
    saves_end = config.train.save_strategy is None and size <= SMALL_CHECKPOINT
    for callback in (
        watch.report,
        watch.gradients,
        recovery,
        watch.interrupt,
        FollowSettings(),
        SetEpoch(plan.data.train, trainer.order),
        *own,
        *([best] if best else []),
        answers,
        *([SaveByClock(minutes, processes, last=saves_end)] if minutes else []),
        *([SaveStreamState(rows, run.checkpoints)] if streamed else []),
        WriteManifest(  # of all files
            run, config.train.save_total_limit, write_beside, processes, when_written
        ),
    ):
        trainer.add_callback(callback)
    return watch
