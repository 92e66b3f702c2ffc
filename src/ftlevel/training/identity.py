"""Identity of a run: one flat record of all that must be unchanged when it resumes.

It is stored with the checkpoints and compared field by field. Its fingerprints cover samples of
files; `hash_base` covers all bytes, in the background of a new run and before a resumed one.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.cards import library_versions
from ftlevel.artifacts.files import file_fingerprint, read_json
from ftlevel.artifacts.run_directory import IDENTITY, RunDirectory
from ftlevel.config import OutputConfig
from ftlevel.config.reading import flatten
from ftlevel.config.train import SECTIONS
from ftlevel.config.trainer import PLATEAU
from ftlevel.errors import ConfigError, InputError, join_names
from ftlevel.models.loading import get_vocabulary
from ftlevel.training.plan.run import Run
from ftlevel.training.summary import get_base_values

BASE, TOKENIZER, TEMPLATE = "model.fingerprint", "model.tokenizer", "model.chat_template"
_CONTENTS = {
    BASE: ("weights of the base model, --model", ["model.name_or_path"]),
    "data.fingerprint": ("rows", ["data.dataset", "data.also"]),
    "data.validation_fingerprint": (
        "validation rows",
        ["data.validation_file", "data.qrels", "data.corpus"],
    ),
    "model.adapter_fingerprint": ("weights of --adapter", ["model.adapter"]),
    **{
        f"{name}.{fingerprint}": (content, [f"{name}.{field}"])
        for name, own in SECTIONS.items()
        for field, (fingerprint, content) in own.contents.items()
    },
}
"""Fingerprint → its content, and fields that may change while the fingerprint stays the same."""
LENGTHS = ("train.num_train_epochs", "train.max_steps", "train.early_stopping_patience")
"""Fields that may change, because a run can be made longer."""
_FREE = [f"{name}.{field}" for name, own in SECTIONS.items() for field in own.may_change]
"""Fields of a task's section that may change."""

# Settings of logging, saving and evaluation, which do not affect the training result.
_UNCHECKED_FIELDS = set(
    """
    logging_steps eval_steps save_steps save_minutes save_total_limit eval_on_start
    predict_with_generate max_generate_samples max_new_tokens metrics num_beams temperature
    top_p per_device_eval_batch_size eval_strategy save_strategy on_nonfinite spike_factor
    max_restarts
    """.split()
)
_EVAL_FIELDS = {"eval_steps", "eval_strategy", "eval_on_start"}
"""Fields that affect the result if the learning-rate schedule depends on evaluations."""


def flatten_config(run: Run, exclude: Mapping[str, Any]) -> dict[str, Any]:
    """Returns dotted name → value of all fields of a run's configuration but `exclude`."""
    values = run.config.model_dump(mode="json", exclude=dict(exclude))
    flat = {"task": values.pop("task")}
    return flat | {f"{section}.{k}": v for section, part in values.items() for k, v in part.items()}


def get_identity(run: Run) -> dict[str, Any]:
    """Returns dotted name → value of all that must be unchanged."""
    config, data, schedule = run.config, run.data, run.schedule
    evaluates = config.train.lr_scheduler_type == PLATEAU
    unchecked = {
        "output": True,
        "train": _UNCHECKED_FIELDS - _EVAL_FIELDS if evaluates else _UNCHECKED_FIELDS,
        "data": {"num_proc", "cache"},
        "speed": {"verify"},
    }
    values = flatten_config(run, unchecked)
    values |= {
        **get_config_values(run.model.config),
        **_get_tokenizer_values(run.model.tokenizer),
        **{f"versions.{name}": version for name, version in library_versions().items()},
        "train.learning_rate": schedule.learning_rate,
        "train.head_learning_rate": schedule.head_learning_rate,
        "model.dtype": run.model.dtype,
        "model.device": run.model.device,
        "data.max_length": data.max_length,
        "data.overlong": data.info["overlong"],
        "data.chat_template": config.data.chat_template and Path(config.data.chat_template).name,
        BASE: get_base_values(run.model.source)["fingerprint"],
        "data.fingerprint": data.info["fingerprint"],
        "data.validation_fingerprint": data.info.get("validation_fingerprint"),
        **{field: model.fingerprint for field, model in run.auxiliary.items()},
    }
    if data.prompt_format is not None and data.prompt_format.kind == "plain":
        values["data.prompt_version"] = data.prompt_format.version
    if run.adapter is not None:
        values["model.adapter_fingerprint"] = run.adapter.fingerprint
    values |= run.hooks.get_identity(run)
    if run.model.device == "cpu":  # the thread count changes the order of sums
        values["threads"] = torch.get_num_threads()
    identity: dict[str, Any] = json.loads(json.dumps(values, default=str))  # as read from the file
    return identity


def hash_base(run: Run) -> dict[str, str]:
    """Returns fields of the identity: `model.fingerprint of FILE` → SHA-256 of a local base."""
    path = run.model.source.path
    if path is None:
        return {}
    weights = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {f"{BASE} of {file.name}": file_fingerprint(file) for file in weights}


def load_identity(output: OutputConfig) -> dict[str, Any] | None:
    """Load the identity of the run to resume; None for a new run.

    Raises ConfigError if the file cannot be read.
    """
    if not output.resume or output.dir is None:
        return None
    path = RunDirectory(output.dir).checkpoints / IDENTITY
    if not path.exists():
        return None
    try:
        identity: dict[str, Any] = read_json(path)
        return identity
    except InputError as error:
        raise ConfigError(f"--resume: {error}") from None


def compare_identities(
    output: OutputConfig, before: Mapping[str, Any], now: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns the differences that `--allow-change` accepts, as records for notes.jsonl.

    Raises ConfigError with all others; of another base or tokenizer, only this is named. Fields of
    `hash_base`, `FIELD of FILE`, are accepted with FIELD, and compared if both records have some.
    A thread count is compared if both runs are on a CPU.
    """
    digests = [{key for key in record if " of " in key} for record in (before, now)]
    ignored = {*LENGTHS, *_FREE, *({"threads"} - before.keys())}
    ignored |= set.union(*digests) if not all(digests) else set()
    for fingerprint, (_, fields) in _CONTENTS.items():
        if now.get(fingerprint) is not None and before.get(fingerprint) == now[fingerprint]:
            ignored |= {*fields}
    keys = [
        key
        for key in sorted({**before, **now})
        if key not in ignored and before.get(key) != now.get(key)
    ]
    refused = [key for key in keys if key.partition(" of ")[0] not in output.allow_change]
    if refused := [key for key in refused if key in (BASE, TOKENIZER, TEMPLATE)] or refused:
        contents = {key: f" ({content})" for key, (content, _) in _CONTENTS.items()}
        message = join_names(
            f"{key}{contents.get(key, '')} was {before.get(key)!r} and is {now.get(key)!r}"
            for key in refused
        )
        note = f" (OMP_NUM_THREADS={before.get('threads')})" if "threads" in refused else ""
        raise ConfigError(
            f"--resume {output.dir}: not the same run: {message}. Restore it{note}, start a new "
            "run in another --output-dir, or pass --allow-change "
            f"{shlex.quote(refused[0].partition(' of ')[0])}"
        )
    return [{"field": key, "was": before.get(key), "is": now.get(key)} for key in keys]


_IGNORED_FIELDS = set(
    """
    _name_or_path transformers_version torch_dtype dtype architectures _attn_implementation
    attn_implementation id2label label2id quantization_config use_cache
    """.split()
)


def get_config_values(config: Any) -> dict[str, Any]:
    """Returns dotted name → value of all fields of `config` that affect a model's outputs."""
    values = flatten(json.loads(config.to_json_string(use_diff=False)), "model.config.")
    return {key: value for key, value in values if not _IGNORED_FIELDS.intersection(key.split("."))}


def _get_tokenizer_values(tokenizer: Any) -> dict[str, str]:
    """Returns digests of a tokenizer and of its chat template."""
    values = {
        TOKENIZER: [get_vocabulary(tokenizer), tokenizer.special_tokens_map],
        TEMPLATE: getattr(tokenizer, "chat_template", None),
    }
    return {
        key: hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()
        for key, value in values.items()
    }
