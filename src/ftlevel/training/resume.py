"""Start a run, or resume it with the same origin from a complete checkpoint.

Also has the messages of interrupted and finished runs.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.checkpoints import delete_best_after, step_of
from ftlevel.artifacts.files import hash_weights, write_json
from ftlevel.artifacts.places import save_relative_paths
from ftlevel.artifacts.run_directory import ORIGIN, RunDirectory, mark_resumed, open_run
from ftlevel.config import ModelConfig, OutputConfig
from ftlevel.config.section import Choice
from ftlevel.config.trainer import TrainerConfig
from ftlevel.data.encoding.chat import set_chat_template
from ftlevel.data.encoding.collate import ensure_pad_token
from ftlevel.errors import ConfigError, Interrupted, did_you_mean, join_names
from ftlevel.events import Listener
from ftlevel.methods import METHODS
from ftlevel.models.loading import load_tokenizer
from ftlevel.models.sources import resolve_source
from ftlevel.tasks import TASKS
from ftlevel.training.origin import (
    BASE,
    PROMPT,
    ROWS,
    FileDigests,
    check_same_run,
    describe_all_settings,
    describe_tokenizer,
    digests_of,
    origin_of,
    read_origin,
    read_origin_file,
)
from ftlevel.training.plan.run import Run
from ftlevel.training.plan.schedule import count_steps, rows_per_epoch
from ftlevel.training.processes import Processes
from ftlevel.training.summary import describe_base, dump_config, resolved_config

WRITTEN_BASE = "base"
"""Subdirectory of a run with a model that was passed as an object and has no other file."""


def store_base(run: Run, directory: RunDirectory, *, is_first: bool) -> tuple[Run, dict[str, Any]]:
    """Move a base passed as an object into the run directory; returns the run and `base_facts`."""
    if run.written_base is not None:
        path = directory.path.resolve() / WRITTEN_BASE
        if is_first and not path.exists():
            shutil.move(run.written_base, path)
        source = replace(run.model.source, name=str(path), location=str(path))
        run = replace(run, model=replace(run.model, source=source))
    return run, base_facts(run)


def base_facts(run: Run) -> dict[str, Any]:
    """Returns name, kind, revision and fingerprint of the base; a digest if passed as an object."""
    facts, path = describe_base(run.model.source), run.model.source.path
    if run.written_base is None or path is None:
        return facts
    return {**facts, "digest": hash_weights(path)}


def check_same_base(
    model: ModelConfig, output: OutputConfig, chat_template: str | None, task: str | None
) -> None:
    """Raise ConfigError if a resumed run has a different base model or tokenizer.

    Called before rows are encoded, because a different tokenizer might fail on them.
    """
    origin = _stored_origin(output)
    if origin is None or output.dir is None:
        return
    source = resolve_source(model.name_or_path, model.revision, model.trust_remote_code)
    expected, fingerprint = origin.get(BASE), describe_base(source)["fingerprint"]
    is_empty = BASE in output.allow_change
    if (
        expected is not None
        and fingerprint is not None
        and fingerprint != expected
        and not is_empty
    ):
        raise ConfigError(
            f"--resume {output.dir}: it was started on {origin.get('model.name_or_path')} with "
            f"weights {expected[:12]}…, and {source.label} has other weights "
            f"({fingerprint[:12]}…). "
            "Use the base it was started on, or start a new run in another --output-dir."
        )
    is_changed = task in TASKS and TASKS[task].changes_tokenizer
    if "model.adapter_fingerprint" not in origin and not is_changed:  # an adapter has its own
        tokenizer = load_tokenizer(source)
        set_chat_template(tokenizer, chat_template)
        ensure_pad_token(tokenizer)
        current = describe_tokenizer(tokenizer)
        stored = {key: origin[key] for key in current if key in origin}
        current = {key: current[key] for key in stored if key not in output.allow_change}
        check_same_run(RunDirectory(output.dir), {key: stored[key] for key in current}, current)


def stored_micro_batch_tokens(output: OutputConfig) -> int | None:
    """Returns the tokens per micro-batch of the run to resume; None if it has none."""
    tokens = (_stored_origin(output) or {}).get("speed.tokens_per_micro_batch")
    return tokens if isinstance(tokens, int) else None


def stored_prompt_version(output: OutputConfig) -> int | None:
    """Returns the version of the plain prompt format in the run to resume; None for a new run."""
    origin = _stored_origin(output)
    return None if origin is None else int(origin.get(f"data.{PROMPT}", 1))


def _stored_origin(output: OutputConfig) -> dict[str, Any] | None:
    """Returns the origin stored by the run to resume; None for a new run."""
    if not output.resume or output.dir is None:
        return None
    directory = RunDirectory(output.dir)
    is_new = not (directory.checkpoints / ORIGIN).exists()
    return None if is_new else read_origin_file(directory)


def check_shared(directory: RunDirectory, processes: Processes) -> None:
    """Raise ConfigError if a process does not see the files that rank 0 writes into `directory`."""
    if processes.count == 1:
        return

    def mark() -> str:
        return Path(tempfile.mkstemp(prefix=".seen-", dir=directory.checkpoints)[1]).name

    def look() -> None:
        if not (directory.checkpoints / name).exists():
            raise ConfigError(
                f"--output-dir {directory.path}: files of rank 0 are not visible here. Choose a "
                f"directory that all machines share."
            )

    name = processes.from_first(mark)
    processes.in_all(look)
    if processes.is_first:
        (directory.checkpoints / name).unlink()


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


_LENGTH_FIELDS = ("train.num_train_epochs", "train.max_steps", "train.early_stopping_patience")
"""Fields that may differ on resume, because a run can be made longer."""


@dataclass(frozen=True)
class ResumeState:
    """State from which a run resumes.

    Attributes:
        checkpoint: latest complete checkpoint; None for a new or finished run.
        past: log records up to the checkpoint.
        has_new_length: whether the planned number of steps has changed.
        finished: summary.json of a run with nothing left to train.
        origin: all values that must stay the same when the run resumes; see `origin_of`.
    """

    checkpoint: Path | None = None
    past: list[dict[str, Any]] = field(default_factory=list)
    has_new_length: bool = False
    finished: Mapping[str, Any] | None = None
    changes: list[dict[str, Any]] = field(default_factory=list)
    origin: Mapping[str, Any] = field(default_factory=dict)

    def missed_evaluation(self, strategy: str, an_epoch: int, steps: int) -> bool:
        """Whether the run was interrupted after a checkpoint and before the epoch's evaluation."""
        if self.checkpoint is None or strategy != "epoch":
            return False
        step = step_of(self.checkpoint)
        is_due = step % an_epoch == 0 or step >= steps
        return is_due and not has_evaluation(self.past, step)


def has_evaluation(records: Sequence[Mapping[str, Any]], step: int) -> bool:
    """Whether `records` have an evaluation at `step`."""
    return any(
        record["step"] == step and any(name.startswith("eval_") for name in record)
        for record in records
    )


def resolve_resume(run: Run, processes: Processes, listener: Listener) -> ResumeState:
    """Returns the state from which the run resumes, before weights load; empty for a new run.

    Raises ConfigError if the processes' runs differ, or for the reasons of `_resolve_resume`.
    """
    origin = origin_of(run, base_facts(run))
    processes.check_same(describe_all_settings(run, origin))
    return processes.from_first(
        lambda: replace(_resolve_resume(run, origin, listener), origin=origin)
    )


def _resolve_resume(run: Run, origin: Mapping[str, Any], listener: Listener) -> ResumeState:
    """Returns the state from which the run resumes; called in the first process only.

    Raises ConfigError if the origin differs, more steps are trained than the new length has, or the
    run is finished without a checkpoint.
    """
    if not run.config.output.resume or run.config.output.dir is None:
        return ResumeState()
    directory, steps = RunDirectory(run.config.output.dir), run.schedule.steps
    if not (directory.checkpoints / ORIGIN).exists():
        listener.warn(
            f"--resume {directory.path}: it has no checkpoint yet, so the run starts from the "
            f"beginning"
        )
        return ResumeState()
    before = read_origin(directory, origin)
    lengths = {key: before.get(key) for key in _LENGTH_FIELDS if before.get(key) != origin[key]}
    accepted = {key: origin[key] for key in lengths}
    accepted |= {key: origin[key] for key in _CONTENT if _has_same_content(key, before, origin)}
    changes = _allowed_changes(run.config.output, before, origin)
    accepted |= {change["field"]: change["is"] for change in changes}
    check_same_run(directory, {**before, **accepted}, origin)
    for digests in digests_of(run):
        changes += _changes_of_files(run.config.output, directory, digests, listener)
    summary = directory.load_summary()
    was_planned = summary and summary.get("planned_steps", summary["steps"])
    if summary is not None and not lengths and was_planned == steps:
        return ResumeState(finished=summary)
    checkpoint = find_checkpoint(directory, listener)
    if checkpoint is None:
        return ResumeState()
    if lengths:
        trained = max(step_of(checkpoint), summary["steps"] if summary else 0)
        _check_length(run, lengths, trained)
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    past = directory.load_log(step_of(checkpoint))
    has_new_length = state["max_steps"] != steps
    choice = Choice("checkpoint", checkpoint, f"step {step_of(checkpoint):,} of {steps:,}")
    listener.choices("resume", [choice])
    return ResumeState(checkpoint, past, has_new_length, changes=changes)


def _check_length(run: Run, before: Mapping[str, Any], trained: int) -> None:
    """Raise ConfigError if the changed length has no effect, is too short, or is unsupported."""
    flag, train, steps = f"--resume {run.config.output.dir}", run.config.train, run.schedule.steps
    old = {key.rpartition(".")[2]: value for key, value in before.items()}
    rows = rows_per_epoch(run.config.train, run.config.steps_per_rollout, run.data)
    was = count_steps(train.model_copy(update=old), rows)
    if was == steps and "num_train_epochs" in old:
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


def open_or_resume(run: Run, resumed: ResumeState, listener: Listener) -> RunDirectory:
    """Create the run directory, or open it to resume; write its configuration and origin."""
    output = run.config.output
    if resumed.checkpoint is not None and output.dir is not None:
        directory = RunDirectory(output.dir)
        mark_resumed(directory.path)
        checkpoints.reject_newer(directory.checkpoints, resumed.checkpoint)
        for change in resumed.changes:
            listener.warn(
                f"{change['field']} is {change['is']!r} from here on, was {change['was']!r}"
            )
        directory.append_changes(step_of(resumed.checkpoint), resumed.changes)
        for digests in digests_of(run):
            if any(change["field"].startswith(digests.field) for change in resumed.changes):
                digests.forget(directory.checkpoints)
    else:
        directory, leftovers = open_run(
            output.dir, run.name, overwrite=output.overwrite, resume=output.resume
        )
        checkpoints.reject_newer(directory.checkpoints, None)
        delete_best_after(directory.checkpoints, 0)
        for line in leftovers:
            listener.warn(
                f"--overwrite {directory.path}: {line}; it is not of the run that is replaced"
            )
    stored_run = run
    if run.written_base is not None:
        path = str(directory.path.absolute() / WRITTEN_BASE)
        stored_run = run.with_settings("model", name_or_path=path)
    directory.save_config(dump_config(stored_run))
    save_relative_paths(directory, resolved_config(stored_run))
    write_json(directory.checkpoints / ORIGIN, resumed.origin)
    return directory


def _allowed_changes(
    output: OutputConfig, before: Mapping[str, Any], origin: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns the fields that differ and `--allow-change` names; ConfigError for unknown names."""
    allowed = output.allow_change
    fields = {**before, **origin}
    unknown = [name for name in allowed if name not in fields]
    if unknown:
        raise ConfigError(
            f"--allow-change {unknown[0]}: no such field.{did_you_mean(unknown[0], fields)} "
            "--resume names the fields that differ."
        )
    return [
        {"field": name, "was": before.get(name), "is": origin.get(name)}
        for name in dict.fromkeys(allowed)
        if before.get(name) != origin.get(name)
    ]


def _changes_of_files(
    output: OutputConfig, directory: RunDirectory, digests: FileDigests, listener: Listener
) -> list[dict[str, Any]]:
    """Returns the files whose bytes changed, as a list of changes.

    Raises:
        ConfigError: files changed and `--allow-change` does not permit it.
    """
    changed = digests.changes(directory.checkpoints)
    if changed is None:
        listener.warn(
            f"--resume {directory.path}: what bytes {digests.description} had when it began is not "
            f"known any more (checkpoints/{digests.file_name}), so only samples of them are "
            "compared"
        )
    elif changed and digests.field not in output.allow_change:
        shown = join_names(f"{n} was {was} and is {now}" for n, (was, now) in changed.items())
        raise ConfigError(
            f"--resume {directory.path}: not the same run: the bytes of {digests.description} "
            f"have changed since it started: {shown} (SHA-256). Restore them, start a new run in "
            f"another --output-dir, or pass --allow-change {digests.field}"
        )
    return [
        {"field": f"{digests.field} of {name}", "was": was, "is": now}
        for name, (was, now) in (changed or {}).items()
    ]


_CONTENT = {
    "model.name_or_path": BASE,
    "data.dataset": ROWS,
    "data.also": ROWS,
    "data.validation_file": "data.validation_fingerprint",
    "data.qrels": "data.validation_fingerprint",
}
"""Fields whose value may change, and the fingerprint that must stay the same."""


def _has_same_content(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the model or dataset of `key` has the same fingerprint in `before` and `now`."""
    content = _CONTENT.get(key, "")
    return now.get(content) is not None and before.get(content) == now[content]


def find_checkpoint(directory: RunDirectory, listener: Listener) -> Path | None:
    """Returns the latest complete checkpoint, or None; warns of newer ones that are corrupted.

    Raises:
        ConfigError: the run is finished and has no complete checkpoint.
    """
    newest, rejected = checkpoints.get_last_valid_checkpoint(directory.checkpoints)
    for line in rejected:
        listener.warn(f"{line}; it is not used")
    if newest is not None:
        return newest
    if directory.load_summary() is not None:
        raise ConfigError(
            f"--resume {directory.path}: it is finished and has no valid checkpoint. Continue "
            f"from its adapter: --adapter {directory.path} with another --output-dir. Runs with "
            f"--save-strategy epoch can be extended."
        )
    listener.warn(
        f"--resume {directory.path}: it has no valid checkpoint, so the run starts from the "
        f"beginning"
    )
    return None


def describe_stop(directory: RunDirectory, state: Any) -> str:
    """Returns the message for a run that a signal stopped after a step, with the resume command."""
    is_longer = directory.adapter.exists()
    adapter = "the adapter is of its former end" if is_longer else "there is no adapter yet"
    return (
        f"interrupted after step {state.global_step:,} of {state.max_steps:,}; "
        f"{directory.checkpoints / f'checkpoint-{state.global_step}'} is kept, and {adapter}. "
        f"{_resume_command(directory)}"
    )


def describe_end(directory: RunDirectory, train: TrainerConfig, summary: Mapping[str, Any]) -> str:
    """Returns the message for a finished run, with the flags that extend it."""
    steps, best = summary["steps"], summary.get("best") or {}
    planned = summary.get("planned_steps", steps)
    length = (
        f"--max-steps {2 * planned}"
        if train.max_steps
        else f"--num-train-epochs {2 * train.num_train_epochs:g}"
    )
    early = " (it stopped early)" if best.get("stopped_early") else ""
    newest, _ = checkpoints.get_last_valid_checkpoint(directory.checkpoints)
    advice = (
        f"For a longer run: --resume {length}."
        if newest
        else (
            f"To continue from its adapter: --adapter {quote(str(directory.path))} with another "
            f"--output-dir."
        )
    )
    return (
        f"{directory.path} is finished: {steps:,} of {planned:,} steps{early}, so no steps "
        f"remain. {advice}"
    )


@contextlib.contextmanager
def explain_interrupt(directory: RunDirectory) -> Iterator[None]:
    """Convert KeyboardInterrupt into Interrupted, whose message names the latest checkpoint."""
    try:
        yield
    except KeyboardInterrupt:
        checkpoint, _ = checkpoints.get_last_valid_checkpoint(directory.checkpoints)
        message = (
            f"{checkpoint} is kept. {_resume_command(directory)}"
            if checkpoint
            else "there was no checkpoint yet."
        )
        raise Interrupted(f"interrupted at once; {message}") from None


def _resume_command(directory: RunDirectory) -> str:
    return f"Resume with: ftlevel train --output-dir {quote(str(directory.path))} --resume"
