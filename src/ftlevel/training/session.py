"""Train a resolved job: load and adapt its model, train, save, and verify what was saved."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ftlevel.artifacts.ownership import mark_end_once, replace_run
from ftlevel.artifacts.run_directory import RunDirectory, lock_directory
from ftlevel.errors import Interrupted
from ftlevel.models.hardware import release_freed_memory, resident_bytes
from ftlevel.training.best import SelectedModel
from ftlevel.training.build_trainer import (
    RunCallbacks,
    add_callbacks,
    build_trainer,
    matmul_context,
    restore_progress,
)
from ftlevel.training.callbacks.gradients import select_skipped_steps
from ftlevel.training.callbacks.saving import WaitForBytes, check_disk_space, explain_disk_errors
from ftlevel.training.callbacks.trackers import describe_run, tracking
from ftlevel.training.finish import (
    end_training,
    measure_times,
    report_results,
    save,
    write_tokenizer_and_card,
)
from ftlevel.training.job import TrainingJob
from ftlevel.training.model import PreparedModel, describe_speed, load_adapted
from ftlevel.training.origin import FileDigests, digests_of
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import WatchProcesses
from ftlevel.training.proof import Proof, prove
from ftlevel.training.reference import compute_initial_reference, precompute_reference
from ftlevel.training.resume import (
    ResumeState,
    check_shared,
    describe_end,
    describe_stop,
    explain_interrupt,
    open_or_resume,
    store_base,
)
from ftlevel.training.rl.checks import check_before
from ftlevel.training.sharding import probe_untrained, prove_sharded, save_sharded
from ftlevel.training.summary import Outcome, resolved_config
from ftlevel.training.teacher import (
    AuxiliaryOutputs,
    build_scorer,
    precompute_teacher,
    with_text_models,
)
from ftlevel.training.trainer import FtlevelTrainer
from ftlevel.training.verify.bounds import StepComparison
from ftlevel.training.verify.proof import verify_step


@dataclass
class TrainingSession:
    """A job with its loaded model, Trainer and run directory.

    Attributes:
        run: the job's run, with the outputs of auxiliary models in its rows.
        base: facts of the base model, for card and summary.
        comparison: of fast and plain step; None if they were not compared.
        initial_logits: before training; None unless a whole model is sharded.
        resident: bytes of the process before the model was loaded.
        selected: the model that is kept; None before training and without a selection.
        trained_at: time at which training ended.
    """

    job: TrainingJob
    run: Run
    adapted: PreparedModel
    auxiliary: AuxiliaryOutputs
    directory: RunDirectory
    base: Mapping[str, Any]
    resumed: ResumeState
    trainer: FtlevelTrainer
    callbacks: RunCallbacks
    comparison: StepComparison | None
    initial_logits: Tensor | None
    resident: int
    selected: SelectedModel | None = None
    trained_at: float = 0.0

    @property
    def is_sharded(self) -> bool:
        """Whether all processes take part in evaluation, saving and verification."""
        return self.run.config.train.shard != "none"

    def train(self) -> None:
        """Train, and keep the best model; raise Interrupted after a signal."""
        run, trainer, checkpoint = self.run, self.trainer, self.resumed.checkpoint
        self.job.listener.stage("training")
        with self.callbacks.interrupt, explain_disk_errors(self.directory), matmul_context(run):
            if checkpoint is None and not run.data.stream:
                trainer.smaller.try_longest(run.data.train, run.model.dtype)
            if checkpoint is None:
                check_before(trainer, run.data.train, self.job.listener)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        interrupt = self.callbacks.interrupt
        if interrupt.has_stopped:
            raise Interrupted(describe_stop(self.directory, trainer.state), interrupt.exit_code)
        best, state = self.callbacks.best, trainer.state
        if best is not None:
            self.selected = best.finish(trainer.model, state.global_step, state.max_steps)
        self.trained_at = time.perf_counter()

    def evaluate(self) -> None:
        """Evaluate the final model, unless its last step was evaluated."""
        with matmul_context(self.run):
            records: Sequence[Mapping[str, Any]] = self.callbacks.report.records
            if self.is_sharded:
                records = self.job.processes.from_first(lambda: records)
            self.run = end_training(self.trainer, self.run, records)
        release_freed_memory()

    def save(self) -> None:
        """Write the adapter or the full model with its tokenizer and card."""
        self.job.listener.stage("saving and verifying")

        def write(weights: Mapping[str, Any] | None = None) -> None:
            start = self.auxiliary.start
            save(self.adapted, self.run, self.directory, self.base, start, weights)

        with explain_disk_errors(self.directory):
            if self.is_sharded:
                save_sharded(self.adapted, self.run.config.method, self.job.processes, write)
            else:
                write()

    def verify(self) -> Proof:
        """Compare what was saved with the trained model; raise RunError if they differ."""
        model, run, directory = self.adapted, self.run, self.directory
        gradients, processes = self.callbacks.gradients, self.job.processes
        with explain_disk_errors(directory):
            if self.is_sharded:
                logits = self.initial_logits
                return prove_sharded(model, run, directory, gradients, processes, logits)
            return prove(model, run, directory, gradients)

    def report(self, proof: Proof) -> Mapping[str, Any]:
        """Write and show the results of the run, and return its summary."""
        job, callbacks, trainer = self.job, self.callbacks, self.trainer
        tokens, records = int(trainer.tokens_seen), callbacks.report.records
        comparison = asdict(self.comparison) if self.comparison else None
        outcome = Outcome(
            run=self.directory.path,
            recipe=job.recipe,
            base=self.base,
            model=self.adapted.model,
            records=records,
            proof=proof,
            timings=measure_times(callbacks.report, job.start, self.trained_at, tokens),
            evaluator=trainer.evaluator,
            answers=callbacks.answers,
            speed=describe_speed(trainer, comparison),
            selected=self.selected,
            changes=self.directory.read_changes(),
            skipped_steps=select_skipped_steps(self.directory.read_notes()),
            plan=job.memory.compare(self.resident),
        )
        facts, notes = self.auxiliary.describe(self.run, records)
        for note in notes:
            job.listener.warn(note)
        return report_results(self.run, outcome, self.directory, job.listener, facts)


def open_session(job: TrainingJob, resumed: ResumeState, stack: ExitStack) -> TrainingSession:
    """Load and adapt the model of `job`, and open its run directory until `stack` closes."""
    run, listener, processes = job.run, job.listener, job.processes
    resident = resident_bytes()
    run, reference = precompute_reference(with_text_models(run, listener), listener)
    teacher = precompute_teacher(run, listener)
    listener.stage("loading the model")  # the auxiliary models are freed
    adapted = load_adapted(run, listener)
    if reference is None:
        run, reference = compute_initial_reference(run, adapted, listener)
    if teacher is not None:
        run = replace(run, data=replace(run.data, train=teacher.rows))
    auxiliary = AuxiliaryOutputs(reference, teacher, build_scorer(run, listener))
    config, steps = run.config, run.schedule.steps
    processes.from_first(
        lambda: check_disk_space(config.output.dir, config.train, adapted.model, steps)
    )
    comparison = verify_step(run, adapted, listener)
    release_freed_memory()
    directory = processes.from_first(lambda: open_or_resume(run, resumed, listener))
    check_shared(directory, processes)
    run, base = store_base(run, directory, is_first=processes.is_first)
    digests = _claim_directory(run, directory, stack) if processes.is_first else ()
    stack.enter_context(explain_interrupt(directory))
    is_sharded = config.train.shard != "none"
    initial_logits = probe_untrained(adapted, run) if is_sharded else None
    trainer = build_trainer(run, adapted, directory, resumed, processes, auxiliary.scorer)
    write_files = partial(write_tokenizer_and_card, run=run, base=base, start=auxiliary.start)
    callbacks = add_callbacks(
        trainer,
        run,
        directory,
        listener,
        processes,
        resumed.checkpoint,
        None if adapted.start else write_files,
    )
    restore_progress(trainer, callbacks, directory, resumed, processes)
    watch = stack.enter_context(WatchProcesses(processes, listener.warn))
    for callback in (WaitForBytes(each.wait for each in digests), watch, *job.callbacks):
        trainer.add_callback(callback)
    if processes.is_first:
        tracked = describe_run(config.output, resolved_config(run), directory, resumed.past)
        writers = tracking(config.output.report_to, tracked, listener)
        callbacks.report.writers += stack.enter_context(writers)
    return TrainingSession(
        job=job,
        run=run,
        adapted=adapted,
        auxiliary=auxiliary,
        directory=directory,
        base=base,
        resumed=resumed,
        trainer=trainer,
        callbacks=callbacks,
        comparison=comparison,
        initial_logits=initial_logits,
        resident=resident,
    )


def _claim_directory(run: Run, directory: RunDirectory, stack: ExitStack) -> Sequence[FileDigests]:
    """Lock the run's directory until `stack` closes, and compute missing digests of its inputs."""
    stack.enter_context(lock_directory(directory.path))
    stack.enter_context(replace_run(directory.path))
    digests = digests_of(run)
    for each in digests:
        each.keep(directory.checkpoints)
        stack.callback(each.wait)
    return digests


def end_finished(job: TrainingJob, directory: RunDirectory, summary: Mapping[str, Any]) -> None:
    """Report a run that was resumed but had already finished."""
    if job.processes.is_first:
        mark_end_once(directory.path)
    message = describe_end(directory, job.run.config.train, summary)
    job.listener.end({**summary, "nothing_left": message})
