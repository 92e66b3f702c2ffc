"""Begin a run, or go on with one: only with the same one, and from a checkpoint that is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.cards import library_versions
from ftlevel.artifacts.checkpoints import step_of
from ftlevel.artifacts.files import write_json
from ftlevel.artifacts.run_directory import RunDirectory, open_run
from ftlevel.config import TrainConfig
from ftlevel.config.renamed import RENAMED
from ftlevel.errors import ConfigError, listing
from ftlevel.events import Listener
from ftlevel.methods import METHODS
from ftlevel.training.plan.plan import Plan
from ftlevel.training.plan.resolve import default_name
from ftlevel.training.plan.schedule import count_steps
from ftlevel.training.summary import dump_config

# These say how a run is watched, not what it computes.
_FREE = {"logging_steps", "eval_steps", "save_steps", "save_minutes", "save_total_limit",
         "eval_on_start", "predict_with_generate", "max_generate_samples", "max_new_tokens",
         "per_device_eval_batch_size", "eval_strategy", "save_strategy"}  # fmt: skip


_LENGTH = ("train.num_train_epochs", "train.max_steps", "train.early_stopping_patience")
"""These may be others than they were: a run can be made longer."""


@dataclass(frozen=True)
class GoingOn:
    """Where a run goes on from.

    Attributes:
        checkpoint: the newest whole one; None where the run begins, or is at its end.
        past: what was logged until then.
        has_new_length: whether the run is to end at another step than when that was written.
        is_changed: whether it was set to another length just now.
        finished: summary.json of a run at which nothing is left to do.
    """

    checkpoint: Path | None = None
    past: list[dict[str, Any]] = field(default_factory=list)
    has_new_length: bool = False
    is_changed: bool = False
    finished: Mapping[str, Any] | None = None

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
        ConfigError: it is not the same run, is to be shorter than it is, or has no checkpoint.
    """
    if not config.output.resume or config.output.dir is None:
        return GoingOn()
    run, steps = RunDirectory(config.output.dir), plan.schedule.steps
    before = read_origin(run, origin)
    lengths = {key: before.get(key) for key in _LENGTH if before.get(key) != origin[key]}
    check_same_run(run, {**before, **{key: origin[key] for key in lengths}}, origin)
    summary = run.read_summary()
    was_planned = summary and summary.get("planned_steps", summary["steps"])
    if summary is not None and not lengths and was_planned == steps:
        return GoingOn(finished=summary)
    checkpoint = find_checkpoint(run, listener)
    if lengths:
        trained = max(step_of(checkpoint), summary["steps"] if summary else 0)
        _check_length(config, plan, lengths, trained)
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    past = run.read_log(step_of(checkpoint))
    return GoingOn(checkpoint, past, state["max_steps"] != steps, bool(lengths))


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
    config: TrainConfig, plan: Plan, origin: Mapping[str, Any], going_on: GoingOn
) -> RunDirectory:
    """Return the run directory: a new one, or that of the run that goes on."""
    output = config.output
    if going_on.checkpoint is not None and output.dir is not None:
        run = RunDirectory(output.dir)
        checkpoints.set_aside_newer(run.checkpoints, going_on.checkpoint)
        if not going_on.is_changed:
            return run
    else:
        run = open_run(output.dir, default_name(config), overwrite=output.overwrite)
    run.write_config(dump_config(config, plan))
    write_json(run.checkpoints / "origin.json", origin)
    return run


def origin_of(config: TrainConfig, plan: Plan, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that must be the same when the run goes on, by dotted name."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude={"output"})
    values["train"] = {k: v for k, v in values["train"].items() if k not in _FREE}
    values["data"] = {k: v for k, v in values["data"].items() if k not in ("num_proc", "cache")}
    values["speed"].pop("verify")
    values["train"]["learning_rate"] = plan.schedule.learning_rate
    values["train"]["head_learning_rate"] = plan.schedule.head_learning_rate
    values["model"] |= {"dtype": plan.model.dtype, "device": plan.model.device}
    values["data"]["max_length"] = plan.data.max_length
    values["data"]["overlong"] = plan.data.facts["overlong"]
    values["data"]["fingerprint"] = plan.data.facts["fingerprint"]
    values["model"]["fingerprint"] = base["fingerprint"]
    if plan.adapter is not None:
        values["model"]["adapter_fingerprint"] = plan.adapter.fingerprint
    values["versions"] = library_versions()
    flat = {"task": values.pop("task")}
    if plan.model.device == "cpu":  # sums are made in as many parts
        flat["threads"] = torch.get_num_threads()
    flat |= {f"{section}.{k}": v for section, part in values.items() for k, v in part.items()}
    plain: dict[str, Any] = json.loads(json.dumps(flat, default=str))  # as it will be read
    return plain


def read_origin(run: RunDirectory, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return the origin of `run`, under today's names; what it did not keep is as in `origin`.

    Raises:
        ConfigError: it cannot be read.
    """
    path = run.checkpoints / "origin.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--resume: {path} cannot be read ({error}).") from None
    before = {RENAMED.get(key, key): value for key, value in before.items()}
    if "threads" in origin:  # a run that was begun before they were kept does not say
        before.setdefault("threads", origin["threads"])
    for key, value in origin.items():  # a field that is younger than the run, as it always was
        if value == _default_of(key):
            before.setdefault(key, value)
    return before


def check_same_run(run: RunDirectory, before: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """Refuse to resume `run` with another configuration, base model or data.

    Args:
        run: its directory.
        before: what `read_origin` says of it.
        origin: what it would be now.

    Raises:
        ConfigError: naming every field that differs, with both values.
    """
    changed = [key for key in {**before, **origin} if before.get(key) != origin.get(key)]
    if changed:
        shown = listing(
            f"{key} was {before.get(key)!r} and is {origin.get(key)!r}" for key in sorted(changed)
        )
        how = f" (OMP_NUM_THREADS={before.get('threads')})" if "threads" in changed else ""
        raise ConfigError(
            f"--resume {run.path}: not the same run: {shown}. "
            f"Give it as it was{how}, or start anew in another --output-dir."
        )


def _default_of(key: str) -> Any:
    """Return the default of a dotted field of a section; None where there is no such."""
    section, _, name = key.partition(".")
    fields = getattr(TrainConfig.model_fields.get(section), "annotation", None)
    field = getattr(fields, "model_fields", {}).get(name)
    default = None if field is None else field.get_default(call_default_factory=True)
    return json.loads(json.dumps(default, default=str))  # as it is kept


def find_checkpoint(run: RunDirectory, listener: Listener) -> Path:
    """Return the newest whole checkpoint of `run`; newer damaged ones are set aside and named.

    Raises:
        ConfigError: there is none.
    """
    newest, rejected = checkpoints.newest_whole(run.checkpoints)
    for line in rejected:
        listener.warn(f"{line}; it is not used")
    if newest is None:
        found = f" ({listing(rejected)})" if rejected else ""
        raise ConfigError(
            f"--resume {run.path}: it has no whole checkpoint{found}. {_without_checkpoint(run)}"
        )
    return newest


def _without_checkpoint(run: RunDirectory) -> str:
    if run.read_summary() is not None:
        return (
            f"Train on from its adapter: --adapter {run.path} with another --output-dir; with "
            "--save-strategy epoch a run can be made longer."
        )
    return "Start it again with --overwrite, and with --save-steps to have checkpoints."
