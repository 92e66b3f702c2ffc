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
from ftlevel.artifacts.places import write_places
from ftlevel.artifacts.run_directory import ORIGIN, RunDirectory, open_run
from ftlevel.config import TrainConfig
from ftlevel.config.renamed import RENAMED
from ftlevel.errors import ConfigError, listing
from ftlevel.events import Listener
from ftlevel.models.sources import resolve_source
from ftlevel.training.given import Taken, describe_taken
from ftlevel.training.plan.plan import Plan
from ftlevel.training.plan.resolve import default_name
from ftlevel.training.summary import describe_base, dump_config, resolved_config

# These say how a run is watched, not what it computes.
_FREE = {"logging_steps", "eval_steps", "save_steps", "save_total_limit", "eval_on_start",
         "predict_with_generate", "max_generate_samples", "max_new_tokens",
         "per_device_eval_batch_size", "eval_strategy", "save_strategy"}  # fmt: skip

_NO_CHECKPOINT = (
    "--resume {}: it has no whole checkpoint{}. Start it again with --overwrite, and with "
    "--save-steps to have checkpoints."
)


def check_base_stays(config: TrainConfig) -> None:
    """Refuse to go on with a run on another base model than it was begun with.

    Before the rows are read, which another tokenizer would find fault with.

    Raises:
        ConfigError: naming both.
    """
    wish, run = config.model, config.output.dir
    if not config.output.resume or run is None:
        return
    before = _read_origin(RunDirectory(run))
    source = resolve_source(wish.name_or_path, wish.revision, wish.trust_remote_code)
    expected, found = before.get("model.fingerprint"), describe_base(source)["fingerprint"]
    if expected is not None and found is not None and found != expected:
        raise ConfigError(
            f"--resume {run}: it was begun on {before.get('model.name_or_path')} with weights "
            f"{expected[:12]}…, and {source.words} has other weights ({found[:12]}…). Name the "
            "base that it was begun on, or start anew in another --output-dir."
        )


def check_resumable(taken: Taken, plan: Plan) -> None:
    """Refuse to go on with another run, or one that has nothing to go on from: before weights load.

    Raises:
        ConfigError: naming every field that differs, with both values.
    """
    directory = taken.config.output.dir
    if directory is None:
        return
    run = RunDirectory(directory)
    check_same_run(run, origin_of(taken.config, plan, describe_taken(plan, taken)))
    if not any(run.checkpoints.glob("checkpoint-*")):
        raise ConfigError(_NO_CHECKPOINT.format(run.path, ""))


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


def open_or_resume(
    taken: Taken, plan: Plan, listener: Listener
) -> tuple[RunDirectory, Path | None]:
    """Return the run directory, and the checkpoint to go on from when resuming.

    What it says of itself is written anew when resuming: its files may have moved.
    """
    config, output, checkpoint = taken.config, taken.config.output, None
    if output.resume and output.dir is not None:
        run = RunDirectory(output.dir)
        checkpoint = find_checkpoint(run, listener)
    else:
        run = open_run(output.dir, default_name(config), overwrite=output.overwrite)
    told = taken.named_in(run)
    run.write_config(dump_config(told, plan))
    write_places(run, resolved_config(told, plan))
    origin = origin_of(config, plan, describe_taken(plan, taken))
    write_json(run.checkpoints / ORIGIN, origin)
    return run, checkpoint


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
    values["model"]["digest"] = base.get("digest")
    values["data"]["validation_fingerprint"] = plan.data.facts.get("validation_fingerprint")
    if template := values["data"]["chat_template"]:
        values["data"]["chat_template"] = Path(template).name
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
    before = _read_origin(run)
    now = json.loads(json.dumps(origin, default=str))
    if "threads" in now:  # a run that was begun before they were kept does not say
        before.setdefault("threads", now["threads"])
    for key, value in now.items():  # a field that is younger than the run, as it always was
        if value == _default_of(key):
            before.setdefault(key, value)
    before.setdefault("data.validation_fingerprint", now.get("data.validation_fingerprint"))
    if None in (before.get("model.digest"), now.get("model.digest")):  # it is now in a file
        before["model.digest"] = now["model.digest"]
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    changed = [key for key in changed if not _is_known_by_content(key, before, now)]
    if changed:
        shown = listing(
            f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in sorted(changed)
        )
        how = f" (OMP_NUM_THREADS={before.get('threads')})" if "threads" in changed else ""
        raise ConfigError(
            f"--resume {run.path}: not the same run: {shown}. "
            f"Give it as it was{how}, or start anew in another --output-dir."
        )


def _read_origin(run: RunDirectory) -> dict[str, Any]:
    path = run.checkpoints / ORIGIN
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--resume: {path} cannot be read ({error}).") from None
    return {RENAMED.get(key, key): value for key, value in found.items()}


_CONTENT = {
    "model.name_or_path": "model.fingerprint",
    "data.dataset": "data.fingerprint",
    "data.also": "data.fingerprint",
    "data.validation_file": "data.validation_fingerprint",
}
"""What may have another name, and what says that it is the same."""


def _is_known_by_content(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether `key` is the name of something that is the same, wherever it is now."""
    content = _CONTENT.get(key, "")
    return now.get(content) is not None and before.get(content) == now[content]


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
        raise ConfigError(_NO_CHECKPOINT.format(run.path, found))
    checkpoints.set_aside_newer(run.checkpoints, newest)
    return newest
