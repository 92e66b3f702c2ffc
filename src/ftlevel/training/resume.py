"""Begin a run, or go on with one: only with the same one, and from a checkpoint that is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.cards import library_versions
from ftlevel.artifacts.files import write_json
from ftlevel.artifacts.run_directory import RunDirectory, open_run
from ftlevel.config import TrainConfig
from ftlevel.config.options.optimizer import PLATEAU
from ftlevel.config.renamed import RENAMED
from ftlevel.errors import ConfigError, listing
from ftlevel.events import Listener
from ftlevel.training.plan.plan import Plan
from ftlevel.training.plan.resolve import default_name
from ftlevel.training.summary import dump_config

# These say how a run is watched, not what it computes.
_FREE = {"logging_steps", "eval_steps", "save_steps", "save_total_limit", "eval_on_start",
         "predict_with_generate", "max_generate_samples", "max_new_tokens",
         "metrics", "num_beams", "temperature", "top_p",
         "per_device_eval_batch_size", "eval_strategy", "save_strategy"}  # fmt: skip


_EVALUATION = {"eval_steps", "eval_strategy", "eval_on_start"}


def open_or_resume(
    config: TrainConfig, plan: Plan, base: Mapping[str, Any], listener: Listener
) -> tuple[RunDirectory, Path | None]:
    """Return the run directory, and the checkpoint to go on from when resuming."""
    output, origin = config.output, origin_of(config, plan, base)
    if output.resume and output.dir is not None:
        run = RunDirectory(output.dir)
        check_same_run(run, origin)
        return run, find_checkpoint(run, listener)
    run = open_run(output.dir, default_name(config), overwrite=output.overwrite)
    run.write_config(dump_config(config, plan))
    write_json(run.checkpoints / "origin.json", origin)
    return run, None


def origin_of(config: TrainConfig, plan: Plan, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that must be the same when the run goes on, by dotted name."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude={"output"})
    free = _FREE if config.train.lr_scheduler_type != PLATEAU else _FREE - _EVALUATION
    values["train"] = {k: v for k, v in values["train"].items() if k not in free}
    values["data"] = {k: v for k, v in values["data"].items() if k not in ("num_proc", "cache")}
    values["speed"].pop("verify")
    values["train"]["learning_rate"] = plan.schedule.learning_rate
    values["train"]["head_learning_rate"] = plan.schedule.head_learning_rate
    values["model"] |= {"dtype": plan.model.dtype, "device": plan.model.device}
    values["data"]["max_length"] = plan.data.max_length
    values["data"]["overlong"] = plan.data.facts["overlong"]
    values["data"]["fingerprint"] = plan.data.facts["fingerprint"]
    values["model"]["fingerprint"] = base["fingerprint"]
    values["versions"] = library_versions()
    flat = {"task": values.pop("task")}
    if plan.model.device == "cpu":  # sums are made in as many parts
        flat["threads"] = torch.get_num_threads()
    flat |= {f"{section}.{k}": v for section, part in values.items() for k, v in part.items()}
    return flat


def check_same_run(run: RunDirectory, origin: Mapping[str, Any]) -> None:
    """Refuse to resume `run` with another configuration, base model or data.

    Raises:
        ConfigError: naming every field that differs, with both values.
    """
    path = run.checkpoints / "origin.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--resume: {path} cannot be read ({error}).") from None
    before = {RENAMED.get(key, key): value for key, value in before.items()}
    now = json.loads(json.dumps(origin, default=str))
    if "threads" in now:  # a run that was begun before they were kept does not say
        before.setdefault("threads", now["threads"])
    for key, value in now.items():  # a field that is younger than the run, as it always was
        if value == _default_of(key):
            before.setdefault(key, value)
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        shown = listing(
            f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in sorted(changed)
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
    return None if field is None else field.get_default(call_default_factory=True)


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
            f"--resume {run.path}: it has no whole checkpoint{found}. Start it again with "
            "--overwrite, and with --save-steps to have checkpoints."
        )
    checkpoints.set_aside_newer(run.checkpoints, newest)
    return newest
