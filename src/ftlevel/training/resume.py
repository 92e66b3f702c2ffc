"""Start a run, or resume the same run from a complete checkpoint."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from tempfile import mkdtemp
from typing import Any

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.checkpoints import delete_best_after, step_of
from ftlevel.artifacts.files import flush_all, hash_weights, lock_dir, read_json, write_json
from ftlevel.artifacts.paths import save_relative_paths
from ftlevel.artifacts.run_directory import IDENTITY, RunDirectory, mark_resumed, open_run
from ftlevel.config import OutputConfig
from ftlevel.config.section import Choice
from ftlevel.config.trainer import TrainerConfig
from ftlevel.errors import ConfigError, Interrupted, did_you_mean
from ftlevel.events import Listener
from ftlevel.methods import METHODS
from ftlevel.training.identity import (
    LENGTHS,
    compare_identities,
    flatten_config,
    get_identity,
    hash_base,
    load_identity,
)
from ftlevel.training.plan.run import Run, Schedule
from ftlevel.training.plan.schedule import count_steps, rows_per_epoch
from ftlevel.training.processes import Processes
from ftlevel.training.summary import dump_config, get_base_values, resolved_config

BASE_DIR = "base"
"""Subdirectory of a run with a model that was passed as an object and has no other file."""


def store_base(run: Run, output_dir: RunDirectory, *, is_first: bool) -> tuple[Run, dict[str, Any]]:
    """Move a base passed as an object into `output_dir`; returns the run and its base's values.

    These are its name, kind, revision and fingerprint, and its digest if it was an object.
    """
    if run.written_base is None:
        return run, get_base_values(run.model.source)
    path = output_dir.path.resolve() / BASE_DIR
    if is_first and not path.exists():
        partial = path.with_name(f".{BASE_DIR}.partial")
        if partial.exists():  # left by a process that was killed while copying
            shutil.rmtree(partial)
        shutil.move(run.written_base, partial)  # copies from another disk
        flush_all(partial)
        partial.rename(path)
    source = replace(run.model.source, name=str(path), location=str(path))
    run = replace(run, model=replace(run.model, source=source))
    return run, {**get_base_values(source), "digest": hash_weights(path)}


def keep_digests(run: Run, output_dir: RunDirectory, identity: Mapping[str, Any]) -> None:
    """Add the digests of the base's files to the stored identity of a new run."""
    with contextlib.suppress(MemoryError, OSError):  # reported by the run itself
        if not any(" of " in key for key in identity):  # else, the run is resumed
            write_json(output_dir.checkpoints / IDENTITY, {**identity, **hash_base(run)})


def load_previous_batch_tokens(output: OutputConfig) -> int | None:
    """Returns the tokens per micro-batch of the run to resume; None if new or not stored."""
    tokens = (load_identity(output) or {}).get("speed.tokens_per_micro_batch")
    return tokens if isinstance(tokens, int) else None


def check_shared(output_dir: RunDirectory, processes: Processes) -> None:
    """Raise ConfigError if a process does not see the files that rank 0 writes."""
    if processes.count == 1:
        return

    def look() -> None:
        if not (checkpoint_dir / name).exists():
            raise ConfigError(
                f"--output-dir {output_dir.path}: files of rank 0 are not visible here. Choose a "
                f"directory that all machines share."
            )

    checkpoint_dir = output_dir.checkpoints
    name = processes.from_first(lambda: Path(mkdtemp(prefix=".seen-", dir=checkpoint_dir)).name)
    processes.in_all(look)
    if processes.is_first:
        (checkpoint_dir / name).rmdir()


def check_base_not_overwritten(run: Run) -> None:
    """Raise ConfigError if `--overwrite` would delete the base model."""
    output, base = run.config.output, run.model.source.path
    if not output.overwrite or output.dir is None or base is None:
        return
    if output.dir.resolve() in (base.resolve(), *base.resolve().parents):
        raise ConfigError(
            f"--overwrite {output.dir}: it contains the base model ({base}), which would be "
            f"deleted. Choose another --output-dir."
        )


PLAIN_STEP = "plain_step"
"""Key of the event that the fast step was disabled; its value is the reason."""


@dataclass(frozen=True)
class ResumeState:
    """State from which a run resumes.

    Attributes:
        identity: all that must be unchanged when the run resumes; see `get_identity`.
        checkpoint: latest complete checkpoint; None for a new or finished run.
        past: log records up to the checkpoint.
        has_new_length: whether the planned number of steps has changed.
        finished: summary.json of a run with nothing left to train.
        changes: differing fields that `--allow-change` accepts.
        failure: how the fast step differed from the plain step, which the run has trained since;
            empty if it did not.
    """

    identity: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    past: list[dict[str, Any]] = field(default_factory=list)
    has_new_length: bool = False
    finished: Mapping[str, Any] | None = None
    changes: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""

    def missed_evaluation(self, strategy: str, schedule: Schedule) -> bool:
        """Returns whether the evaluation due at the checkpoint (end of epoch or run) is missing."""
        if self.checkpoint is None or strategy != "epoch":
            return False
        step = step_of(self.checkpoint)
        is_due = step % schedule.steps_per_epoch == 0 or step >= schedule.steps
        return is_due and not has_evaluation(self.past, step)


def has_evaluation(records: Sequence[Mapping[str, Any]], step: int) -> bool:
    """Whether `records` have an evaluation at `step`."""
    return any(
        record["step"] == step and any(name.startswith("eval_") for name in record)
        for record in records
    )


def resolve_resume(run: Run, processes: Processes, listener: Listener) -> ResumeState:
    """Returns the state from which the run resumes, before weights load.

    That of a new run has only the identity.
    """
    identity = get_identity(run)
    everything = {**flatten_config(run, {"output": {"allow_change"}}), **identity}
    everything.pop("threads", None)  # may differ by machine
    processes.check_same(everything)
    return processes.from_first(lambda: _resolve_resume(run, identity, listener))


def _resolve_resume(run: Run, identity: dict[str, Any], listener: Listener) -> ResumeState:
    output, steps = run.config.output, run.schedule.steps
    if (before := load_identity(output)) is None or output.dir is None:
        if output.resume:
            listener.warn(
                f"--resume {output.dir}: it has no checkpoint yet, so the run starts from the "
                "beginning"
            )
        return ResumeState(identity)
    known = {**before, **identity}
    if invalid := [name for name in output.allow_change if name not in known]:
        raise ConfigError(
            f"--allow-change {invalid[0]}: no such field.{did_you_mean(invalid[0], known)} "
            "--resume names the fields that differ."
        )
    identity |= hash_base(run)
    changes = compare_identities(output, before, identity)
    output_dir = RunDirectory(output.dir)
    summary = output_dir.load_summary()
    lengths = {key: before.get(key) for key in LENGTHS if before.get(key) != identity[key]}
    if summary and not lengths and summary.get("planned_steps", summary["steps"]) == steps:
        return ResumeState(identity, finished=summary)
    checkpoint = get_last_checkpoint(output_dir, listener)
    if checkpoint is None:
        return ResumeState(identity)
    if lengths:
        trained = max(step_of(checkpoint), summary["steps"] if summary else 0)
        _check_length(run, lengths, trained)
    choice = Choice("checkpoint", checkpoint, f"step {step_of(checkpoint):,} of {steps:,}")
    listener.choices("resume", [choice])
    events = output_dir.load_events()
    return ResumeState(
        identity,
        checkpoint,
        past=output_dir.load_log(step_of(checkpoint)),
        has_new_length=read_json(checkpoint / "trainer_state.json")["max_steps"] != steps,
        changes=changes,
        failure=next((event[PLAIN_STEP] for event in events if PLAIN_STEP in event), ""),
    )


def _check_length(run: Run, before: Mapping[str, Any], trained: int) -> None:
    flag, train, steps = f"--resume {run.config.output.dir}", run.config.train, run.schedule.steps
    old = {key.rpartition(".")[2]: value for key, value in before.items()}
    rows = rows_per_epoch(train, run.config.task_section.steps_per_batch, run.data)
    was = count_steps(train.model_copy(update=old), rows)
    if train.max_steps and was == steps and "num_train_epochs" in old:
        raise ConfigError(
            f"--num-train-epochs {train.num_train_epochs:g} has no effect: --max-steps "
            f"{train.max_steps:,} sets the length of the run. Use a larger --max-steps."
        )
    if steps < trained:
        raise ConfigError(
            f"{flag}: {steps:,} steps are fewer than the {trained:,} already trained. Use more, "
            f"or start a new run in another --output-dir."
        )
    error = METHODS[run.config.method.kind].resume_error
    if error and was != steps:
        raise ConfigError(
            f"{flag}: --method {run.config.method.kind} cannot train {steps:,} steps in place of "
            f"{was:,}: {error}. Start a new run in another --output-dir."
        )


def open_or_resume(run: Run, state: ResumeState, listener: Listener) -> RunDirectory:
    """Create the run directory, or open it to resume; write config.yaml and `state.identity`."""
    output = run.config.output
    if state.checkpoint is not None and output.dir is not None:
        output_dir = RunDirectory(output.dir)
        with lock_dir(output_dir.path):  # another run may have resumed while the weights loaded
            if not state.checkpoint.is_dir():
                raise ConfigError(
                    f"--resume {output_dir.path}: another run has replaced "
                    f"{state.checkpoint.name} meanwhile. Resume it again."
                )
            mark_resumed(output_dir.path)
            checkpoints.reject_newer(output_dir.checkpoints, state.checkpoint)
        for change in state.changes:
            listener.warn(
                f"{change['field']} is {change['is']!r} from here on, was {change['was']!r}"
            )
            output_dir.note({"step": step_of(state.checkpoint), **change})
    else:
        output_dir, leftovers = open_run(
            output.dir, run.name, overwrite=output.overwrite, resume=output.resume
        )
        checkpoints.reject_newer(output_dir.checkpoints, None)
        delete_best_after(output_dir.checkpoints, 0)
        for line in leftovers:
            listener.warn(
                f"--overwrite {output_dir.path}: {line}; it is not of the run that is replaced"
            )
    saved_run = run
    if run.written_base is not None:
        path = str(output_dir.path.absolute() / BASE_DIR)
        saved_run = run.with_settings("model", name_or_path=path)
    output_dir.save_config(dump_config(saved_run))
    save_relative_paths(output_dir, resolved_config(saved_run))
    write_json(output_dir.checkpoints / IDENTITY, state.identity)
    return output_dir


def get_last_checkpoint(output_dir: RunDirectory, listener: Listener) -> Path | None:
    """Returns the latest complete checkpoint, or None; warns of newer ones that are corrupted."""
    newest, rejected = checkpoints.get_last_valid_checkpoint(output_dir.checkpoints)
    for line in rejected:
        listener.warn(f"{line}; it is not used")
    if newest is not None:
        return newest
    if output_dir.load_summary() is not None:
        raise ConfigError(
            f"--resume {output_dir.path}: it is finished and has no valid checkpoint. Continue "
            f"from its adapter: --adapter {output_dir.path} with another --output-dir. Runs with "
            f"--save-strategy epoch can be extended."
        )
    listener.warn(
        f"--resume {output_dir.path}: it has no valid checkpoint, so the run starts from the "
        f"beginning"
    )
    return None


def get_interrupt_message(output_dir: RunDirectory, state: Any) -> str:
    """Returns the message for a run that a signal stopped after a step, with the resume command."""
    is_longer = output_dir.adapter.exists()
    adapter = "the adapter is from the shorter run" if is_longer else "there is no adapter yet"
    return (
        f"interrupted after step {state.global_step:,} of {state.max_steps:,}; "
        f"{output_dir.checkpoints / f'checkpoint-{state.global_step}'} is kept, and {adapter}. "
        f"{_get_command(output_dir)}"
    )


def get_finished_message(
    output_dir: RunDirectory, train: TrainerConfig, summary: Mapping[str, Any]
) -> str:
    """Returns the message for a finished run, with the flags that extend it."""
    steps, best = summary["steps"], summary.get("best") or {}
    planned = summary.get("planned_steps", steps)
    length = (
        f"--max-steps {2 * planned}"
        if train.max_steps
        else f"--num-train-epochs {2 * train.num_train_epochs:g}"
    )
    early = ""
    if best.get("stopped_early"):
        early, waited = " (it stopped early)", best.get("waited") or best["patience"]
        length = f"--early-stopping-patience {2 * waited}"
    newest, _ = checkpoints.get_last_valid_checkpoint(output_dir.checkpoints)
    suggestion = (
        f"For a longer run: --resume {length}."
        if newest
        else f"To continue from its adapter: --adapter {quote(str(output_dir.path))} with another "
        "--output-dir."
    )
    return (
        f"{output_dir.path} is finished: {steps:,} of {planned:,} steps{early}, so no steps "
        f"remain. {suggestion}"
    )


@contextlib.contextmanager
def convert_interrupt(output_dir: RunDirectory) -> Iterator[None]:
    """Convert KeyboardInterrupt into Interrupted, whose message names the latest checkpoint."""
    try:
        yield
    except KeyboardInterrupt:
        checkpoint, _ = checkpoints.get_last_valid_checkpoint(output_dir.checkpoints)
        message = (
            f"{checkpoint} is kept. {_get_command(output_dir)}"
            if checkpoint
            else "there was no checkpoint yet."
        )
        raise Interrupted(f"interrupted at once; {message}") from None


def _get_command(output_dir: RunDirectory) -> str:
    return f"Resume with: ftlevel train --output-dir {quote(str(output_dir.path))} --resume"
