"""What must be the same when a run goes on: what it was begun with, kept and compared."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.cards import library_versions
from ftlevel.artifacts.files import read_plain
from ftlevel.artifacts.run_directory import ORIGIN, RunDirectory
from ftlevel.config import TrainConfig
from ftlevel.config.options.optimizer import PLATEAU
from ftlevel.config.reading.renamed import RENAMED
from ftlevel.errors import ConfigError, listing
from ftlevel.training.going_on.identity import CONFIG, TEMPLATE, TOKENIZER, describe_model
from ftlevel.training.plan.plan import Plan

# These say how a run is watched, not what it computes.
_FREE = {"logging_steps", "eval_steps", "save_steps", "save_minutes", "save_total_limit",
         "eval_on_start", "predict_with_generate", "max_generate_samples", "max_new_tokens",
         "metrics", "num_beams", "temperature", "top_p",
         "per_device_eval_batch_size", "eval_strategy", "save_strategy", "on_nonfinite",
         "spike_factor", "max_restarts"}  # fmt: skip
PROMPT = "prompt_version"
"""Field of the data section in an origin: the version of plain prompts."""
_EVALUATION = {"eval_steps", "eval_strategy", "eval_on_start"}
"""Where the schedule waits for evaluations, these decide what is computed."""


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
    if plan.data.prompt_format is not None and plan.data.prompt_format.kind == "plain":
        values["data"][PROMPT] = plan.data.prompt_format.version
    values["model"]["fingerprint"] = base["fingerprint"]
    if plan.adapter is not None:
        values["model"]["adapter_fingerprint"] = plan.adapter.fingerprint
    for (section, name), fingerprint in plan.beside.fingerprints().items():
        values[section][name] = fingerprint  # wherever it lies
    values["model"]["digest"] = base.get("digest")
    values["data"]["validation_fingerprint"] = plan.data.facts.get("validation_fingerprint")
    if template := values["data"]["chat_template"]:
        values["data"]["chat_template"] = Path(template).name
    values["versions"] = library_versions()
    flat = {"task": values.pop("task"), **describe_model(plan.model)}
    if plan.model.device == "cpu":  # sums are made in as many parts
        flat["threads"] = torch.get_num_threads()
    flat |= {f"{section}.{k}": v for section, part in values.items() for k, v in part.items()}
    plain: dict[str, Any] = json.loads(json.dumps(flat, default=str))  # as it will be read
    return plain


def everything_of(config: TrainConfig, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be the same in all processes of a run, by dotted name.

    More than what must be the same when it goes on, such as when it is saved; but not the threads,
    of which machines may have more or fewer.

    Args:
        config: the whole configuration.
        origin: what `origin_of` gives.
    """
    values = config.model_dump(mode="json")
    values["output"].pop("allow_change")
    flat = {"task": values.pop("task")}
    flat |= {f"{section}.{k}": v for section, part in values.items() for k, v in part.items()}
    return {**flat, **{key: value for key, value in origin.items() if key != "threads"}}


def read_origin(run: RunDirectory, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return the origin of `run`, under today's names; what it did not keep is as in `origin`.

    Raises:
        ConfigError: it cannot be read.
    """
    before = read_origin_file(run)
    if "threads" in origin:  # a run that was begun before they were kept does not say
        before.setdefault("threads", origin["threads"])
    none = before.get("quant.kind", "none") == "none"
    before.setdefault("quant.experts", None if none else False)  # runs of then packed none
    knows_model = TOKENIZER in before
    for key, value in origin.items():  # a field that is younger than the run, as it always was
        of_model = key.startswith((TOKENIZER, TEMPLATE, CONFIG)) and not knows_model
        if of_model or value == _default_of(key):
            before.setdefault(key, value)
    if f"data.{PROMPT}" in origin:  # runs of version 1 did not keep it
        before.setdefault(f"data.{PROMPT}", 1)
    before.setdefault("data.validation_fingerprint", origin.get("data.validation_fingerprint"))
    if None in (before.get("model.digest"), origin.get("model.digest")):  # it is now in a file
        before["model.digest"] = origin["model.digest"]
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
            f"Give it as it was{how}, start anew in another --output-dir, or let it change: "
            f"--allow-change {shlex.quote(sorted(changed)[0])}"
        )


def read_origin_file(run: RunDirectory) -> dict[str, Any]:
    """Return what `run` kept of its beginning, under today's names.

    Raises:
        ConfigError: it cannot be read.
    """
    path = run.checkpoints / ORIGIN
    try:
        found: Any = json.loads(read_plain(path))
        if not isinstance(found, dict):
            raise TypeError("it is no object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"--resume: {path} cannot be read ({error}).") from None
    return {RENAMED.get(key) or key: value for key, value in found.items()}


def _default_of(key: str) -> Any:
    """Return the default of a dotted field of a section; None where there is no such."""
    section, _, name = key.partition(".")
    fields = getattr(TrainConfig.model_fields.get(section), "annotation", None)
    field = getattr(fields, "model_fields", {}).get(name)
    default = None if field is None else field.get_default(call_default_factory=True)
    return json.loads(json.dumps(default, default=str))  # as it is kept
