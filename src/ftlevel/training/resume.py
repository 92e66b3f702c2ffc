"""Begin a run, or go on with one: only with the same one, and from a checkpoint that is whole.

What an interrupted run says: what was kept, and how to go on.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.checkpoints import forget_later, step_of
from ftlevel.artifacts.files import write_json
from ftlevel.artifacts.ownership import mark_going_on
from ftlevel.artifacts.places import write_places
from ftlevel.artifacts.run_directory import ORIGIN, RunDirectory, open_run
from ftlevel.config import TrainConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.chat import choose_chat_template
from ftlevel.data.encoding.collate import choose_pad_token
from ftlevel.errors import ConfigError, Interrupted, did_you_mean, listing
from ftlevel.events import Listener
from ftlevel.methods import METHODS
from ftlevel.models.loading import load_tokenizer
from ftlevel.models.sources import resolve_source
from ftlevel.training.given import Taken
from ftlevel.training.origin import (
    BASE,
    PROMPT,
    ROWS,
    FileDigests,
    check_same_run,
    describe_tokenizer,
    digests_of,
    read_origin,
    read_origin_file,
)
from ftlevel.training.plan.plan import Plan
from ftlevel.training.plan.resolve import default_name
from ftlevel.training.plan.schedule import count_steps
from ftlevel.training.processes import Processes
from ftlevel.training.summary import describe_base, dump_config, resolved_config


def check_base_stays(config: TrainConfig) -> None:
    """Refuse to go on with a run on another base model than it was begun with.

    Before the rows are read, which another tokenizer would find fault with.

    Raises:
        ConfigError: naming both.
    """
    wish, run = config.model, config.output.dir
    before = _begun_as(config)
    if before is None or run is None:
        return
    source = resolve_source(wish.name_or_path, wish.revision, wish.trust_remote_code)
    expected, found = before.get(BASE), describe_base(source)["fingerprint"]
    is_free = BASE in config.output.allow_change
    if expected is not None and found is not None and found != expected and not is_free:
        raise ConfigError(
            f"--resume {run}: it was begun on {before.get('model.name_or_path')} with weights "
            f"{expected[:12]}…, and {source.words} has other weights ({found[:12]}…). Name the "
            "base that it was begun on, or start anew in another --output-dir."
        )
    if "model.adapter_fingerprint" not in before:  # which has a tokenizer of its own
        tokenizer = load_tokenizer(source)
        choose_chat_template(tokenizer, config.data.chat_template)
        choose_pad_token(tokenizer)
        now = describe_tokenizer(tokenizer)
        known = {key: before[key] for key in now if key in before}
        now = {key: now[key] for key in known if key not in config.output.allow_change}
        check_same_run(RunDirectory(run), {key: known[key] for key in now}, now)


def tokens_begun_with(config: TrainConfig) -> int | None:
    """Return the tokens of a micro-batch of the run that goes on; None where none were chosen."""
    known = (_begun_as(config) or {}).get("speed.tokens_per_micro_batch")
    return known if isinstance(known, int) else None


def prompt_version_begun_with(config: TrainConfig) -> int | None:
    """Return the version of plain prompts of the run that is resumed; None where a run begins."""
    before = _begun_as(config)
    return None if before is None else int(before.get(f"data.{PROMPT}", 1))


def _begun_as(config: TrainConfig) -> dict[str, Any] | None:
    """Return the origin of the run that goes on; None where a run begins."""
    run = config.output.dir
    if not config.output.resume or run is None:
        return None
    if not (RunDirectory(run).checkpoints / ORIGIN).exists():  # it begins anew
        return None
    return read_origin_file(RunDirectory(run))


def check_shared(run: RunDirectory, processes: Processes) -> None:
    """Refuse a run directory that not all processes see.

    Raises:
        ConfigError: naming the first that does not.
    """
    if processes.count == 1:
        return

    def mark() -> str:
        return Path(tempfile.mkstemp(prefix=".seen-", dir=run.checkpoints)[1]).name

    def look() -> None:
        if not (run.checkpoints / name).exists():
            raise ConfigError(
                f"--output-dir {run.path}: what rank 0 writes there is not to be seen here. Name a "
                "directory that all machines of the run share."
            )

    name = processes.from_first(mark)
    processes.in_all(look)
    if processes.is_first:
        (run.checkpoints / name).unlink()


def check_base_outlives(config: TrainConfig, plan: Plan) -> None:
    """Refuse to replace a directory in which the base model is.

    Raises:
        ConfigError: it would be deleted with it.
    """
    output, base = config.output, plan.model.source.path
    if not output.overwrite or output.dir is None or base is None:
        return
    if output.dir.resolve() in (base.resolve(), *base.resolve().parents):
        raise ConfigError(
            f"--overwrite {output.dir}: the base model is in it ({base}), and would be deleted "
            "with it. Name another --output-dir."
        )


_LENGTH = ("train.num_train_epochs", "train.max_steps", "train.early_stopping_patience")
"""These may be others than they were: a run can be made longer."""


@dataclass(frozen=True)
class GoingOn:
    """Where a run goes on from.

    Attributes:
        checkpoint: the newest whole one; None where the run begins, or is at its end.
        past: what was logged until then.
        has_new_length: whether the run is to end at another step than when that was written.
        finished: summary.json of a run at which nothing is left to do.
        changes: what is another than it was, by the user's leave.
    """

    checkpoint: Path | None = None
    past: list[dict[str, Any]] = field(default_factory=list)
    has_new_length: bool = False
    finished: Mapping[str, Any] | None = None
    changes: list[dict[str, Any]] = field(default_factory=list)

    def owes_evaluation(self, strategy: str, an_epoch: int, steps: int) -> bool:
        """Whether the run was broken off between a checkpoint and the evaluation of its epoch.

        Args:
            strategy: when the run is evaluated.
            an_epoch: steps of an epoch.
            steps: of the run.
        """
        if self.checkpoint is None or strategy != "epoch":
            return False
        step = step_of(self.checkpoint)
        is_due = step % an_epoch == 0 or step >= steps
        return is_due and not any("eval_loss" in r and r["step"] == step for r in self.past)


def find_going_on(
    config: TrainConfig, plan: Plan, origin: Mapping[str, Any], listener: Listener
) -> GoingOn:
    """Return where the run goes on from, before weights load; a new run goes on from nowhere.

    Raises:
        ConfigError: it is not the same run, is to be shorter than it is, or is done and has no
            checkpoint.
    """
    if not config.output.resume or config.output.dir is None:
        return GoingOn()
    run, steps = RunDirectory(config.output.dir), plan.schedule.steps
    if not (run.checkpoints / ORIGIN).exists():
        listener.warn(f"--resume {run.path}: it has no checkpoint yet, so the run begins anew")
        return GoingOn()
    before = read_origin(run, origin)
    lengths = {key: before.get(key) for key in _LENGTH if before.get(key) != origin[key]}
    accepted = {key: origin[key] for key in lengths}
    accepted |= {key: origin[key] for key in _CONTENT if _is_known_by_content(key, before, origin)}
    changes = _allowed_changes(config, before, origin)
    accepted |= {change["field"]: change["is"] for change in changes}
    check_same_run(run, {**before, **accepted}, origin)
    for digests in digests_of(plan):
        changes += _changes_of_files(config, run, digests, listener)
    summary = run.read_summary()
    was_planned = summary and summary.get("planned_steps", summary["steps"])
    if summary is not None and not lengths and was_planned == steps:
        return GoingOn(finished=summary)
    checkpoint = find_checkpoint(run, listener)
    if checkpoint is None:
        return GoingOn()
    if lengths:
        trained = max(step_of(checkpoint), summary["steps"] if summary else 0)
        _check_length(config, plan, lengths, trained)
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    past = run.read_log(step_of(checkpoint))
    has_new_length = state["max_steps"] != steps
    where = Choice("checkpoint", checkpoint, f"step {step_of(checkpoint):,} of {steps:,}")
    listener.choices("resume", [where])
    return GoingOn(checkpoint, past, has_new_length, changes=changes)


def _check_length(config: TrainConfig, plan: Plan, before: Mapping[str, Any], trained: int) -> None:
    """Refuse a length that changes nothing, was trained already, or that the method cannot take.

    Args:
        config: the whole configuration.
        plan: its plan.
        before: the fields of the length that were others.
        trained: steps that the run has made.

    Raises:
        ConfigError: it cannot be had.
    """
    where, train, steps = f"--resume {config.output.dir}", config.train, plan.schedule.steps
    old = {key.rpartition(".")[2]: value for key, value in before.items()}
    was = count_steps(train.model_copy(update=old), len(plan.data.train))
    if was == steps and "num_train_epochs" in old:
        raise ConfigError(
            f"--num-train-epochs {train.num_train_epochs:g} changes nothing: --max-steps "
            f"{train.max_steps:,} says how long the run is. Give a larger --max-steps."
        )
    if steps < trained:
        raise ConfigError(
            f"{where}: {steps:,} steps are fewer than the {trained:,} that are trained. Give more, "
            "or start anew in another --output-dir."
        )
    reason = METHODS[config.method.kind].why_not_continued
    if reason and was != steps:
        raise ConfigError(
            f"{where}: --method {config.method.kind} cannot train {steps:,} steps in place of "
            f"{was:,}: {reason}. Start anew in another --output-dir."
        )


def open_or_go_on(
    taken: Taken,
    plan: Plan,
    origin: Mapping[str, Any],
    going_on: GoingOn,
    listener: Listener,
) -> RunDirectory:
    """Return the run directory: a new one, or that of the run that goes on.

    What it says of itself is written anew: its length, and where its files are, may be others.
    """
    config, output = taken.config, taken.config.output
    if going_on.checkpoint is not None and output.dir is not None:
        run = RunDirectory(output.dir)
        mark_going_on(run.path)
        checkpoints.set_aside_newer(run.checkpoints, going_on.checkpoint)
        for change in going_on.changes:
            listener.warn(
                f"{change['field']} is {change['is']!r} from here on, was {change['was']!r}"
            )
        run.write_changes(step_of(going_on.checkpoint), going_on.changes)
        for digests in digests_of(plan):
            if any(change["field"].startswith(digests.field) for change in going_on.changes):
                digests.forget(run.checkpoints)
    else:
        run, kept = open_run(
            output.dir, default_name(config), overwrite=output.overwrite, resume=output.resume
        )
        checkpoints.set_aside_newer(run.checkpoints, None)
        forget_later(run.checkpoints, 0)
        for line in kept:
            listener.warn(f"--overwrite {run.path}: {line}; it is not of the run that is replaced")
    told = taken.named_in(run)
    run.write_config(dump_config(told, plan))
    write_places(run, resolved_config(told, plan))
    write_json(run.checkpoints / ORIGIN, origin)
    return run


def _allowed_changes(
    config: TrainConfig, before: Mapping[str, Any], origin: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return what is another than it was, and may be.

    Raises:
        ConfigError: a field is named that there is not.
    """
    allowed = config.output.allow_change
    known = {**before, **origin}
    unknown = [name for name in allowed if name not in known]
    if unknown:
        raise ConfigError(
            f"--allow-change {unknown[0]}: no such field.{did_you_mean(unknown[0], known)} "
            "--resume names the fields that differ."
        )
    return [
        {"field": name, "was": before.get(name), "is": origin.get(name)}
        for name in dict.fromkeys(allowed)
        if before.get(name) != origin.get(name)
    ]


def _changes_of_files(
    config: TrainConfig, run: RunDirectory, digests: FileDigests, listener: Listener
) -> list[dict[str, Any]]:
    """Return what bytes of the files are others than when the run began, and may be.

    Raises:
        ConfigError: naming the files; they may not.
    """
    changed = digests.changes(run.checkpoints)
    if changed is None:
        listener.warn(
            f"--resume {run.path}: what bytes {digests.words} had when it began is not known any "
            f"more (checkpoints/{digests.kept}), so only samples of them are compared"
        )
    elif changed and digests.field not in config.output.allow_change:
        shown = listing(f"{n} was {was} and is {now}" for n, (was, now) in changed.items())
        raise ConfigError(
            f"--resume {run.path}: not the same run: the bytes of {digests.words} are others than "
            f"when it began: {shown} (SHA-256). Restore them, start anew in another --output-dir, "
            f"or let them change: --allow-change {digests.field}"
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
}
"""What may have another name, and what says that it is the same."""


def _is_known_by_content(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether `key` is the name of something that is the same, wherever it is now."""
    content = _CONTENT.get(key, "")
    return now.get(content) is not None and before.get(content) == now[content]


def find_checkpoint(run: RunDirectory, listener: Listener) -> Path | None:
    """Return the newest whole checkpoint of `run`, or None if it has none and begins anew.

    Newer ones that are damaged are named.

    Raises:
        ConfigError: it has none, and is done.
    """
    newest, rejected = checkpoints.newest_whole(run.checkpoints)
    for line in rejected:
        listener.warn(f"{line}; it is not used")
    if newest is not None:
        return newest
    if run.read_summary() is not None:
        raise ConfigError(
            f"--resume {run.path}: it is done, and has no whole checkpoint. Train on from its "
            f"adapter: --adapter {run.path} with another --output-dir; with --save-strategy epoch "
            "a run can be made longer."
        )
    listener.warn(f"--resume {run.path}: it has no whole checkpoint, so the run begins anew")
    return None


def describe_stop(run: RunDirectory, state: Any) -> str:
    """Say what a run that was stopped after a step has.

    Args:
        run: its directory.
        state: Trainer's, whose step has a checkpoint.
    """
    is_longer = run.adapter.exists()
    adapter = "the adapter is of its former end" if is_longer else "there is no adapter yet"
    return (
        f"interrupted after step {state.global_step:,} of {state.max_steps:,}; "
        f"{run.checkpoints / f'checkpoint-{state.global_step}'} is kept, and {adapter}. "
        f"{_go_on(run)}"
    )


def describe_end(run: RunDirectory, config: TrainConfig, summary: Mapping[str, Any]) -> str:
    """Say that a run is finished, and what would make it longer.

    Args:
        run: its directory.
        config: the whole configuration.
        summary: what summary.json holds.
    """
    steps, best = summary["steps"], summary.get("best") or {}
    planned, train = summary.get("planned_steps", steps), config.train
    length = (
        f"--max-steps {2 * planned}"
        if train.max_steps
        else f"--num-train-epochs {2 * train.num_train_epochs:g}"
    )
    early = " (it stopped early)" if best.get("stopped_early") else ""
    newest, _ = checkpoints.newest_whole(run.checkpoints)
    more = (
        f"A longer run goes on from there: --resume {length}."
        if newest
        else f"To train on from its adapter: --adapter {quote(str(run.path))}, and another "
        "--output-dir."
    )
    return (
        f"{run.path} is finished: {steps:,} of {planned:,} steps{early}, and nothing is "
        f"left to train. {more}"
    )


@contextlib.contextmanager
def telling_what_is_kept(run: RunDirectory) -> Iterator[None]:
    """Say what the run has when Ctrl-C ends the block at once, in the middle of a step or a save.

    Raises:
        Interrupted: instead of KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        whole, _ = checkpoints.newest_whole(run.checkpoints)
        kept = f"{whole} is kept. {_go_on(run)}" if whole else "there was no checkpoint yet."
        raise Interrupted(f"interrupted at once; {kept}") from None


def _go_on(run: RunDirectory) -> str:
    return f"Go on with: ftlevel train --output-dir {quote(str(run.path))} --resume"
