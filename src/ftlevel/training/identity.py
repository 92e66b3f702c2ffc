"""Identity of a run: one flat record of all that must be unchanged when it resumes.

It is stored with the checkpoints and compared field by field. Its fingerprints cover samples of
files; `FileDigests` hashes all bytes, in the background of a new run and before a resumed one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.cards import library_versions
from ftlevel.artifacts.files import file_fingerprint, read_json, write_json
from ftlevel.artifacts.run_directory import DIGESTS, IDENTITY, RunDirectory
from ftlevel.config import OutputConfig
from ftlevel.config.train import SECTIONS
from ftlevel.config.trainer import PLATEAU
from ftlevel.errors import ConfigError, InputError, join_names
from ftlevel.training.plan.run import Run

BASE, ROWS, VALIDATION = "model.fingerprint", "data.fingerprint", "data.validation_fingerprint"
ADAPTER = "model.adapter_fingerprint"
_CONTENTS = {
    BASE: " (weights of the base model, --model)",
    ROWS: " (rows)",
    VALIDATION: " (validation rows)",
    ADAPTER: " (weights of --adapter)",
    **{
        f"{name}.{fingerprint}": f" ({content})"
        for name, own in SECTIONS.items()
        for fingerprint, content in own.contents.values()
    },
}
"""Fields with the fingerprint of a content, which may have moved."""
_MOVABLE = {
    "model.name_or_path": BASE,
    "model.adapter": ADAPTER,
    "data.dataset": ROWS,
    "data.also": ROWS,
    **dict.fromkeys(("data.validation_file", "data.qrels", "data.corpus"), VALIDATION),
    **{
        f"{name}.{field}": f"{name}.{fingerprint}"
        for name, own in SECTIONS.items()
        for field, (fingerprint, _) in own.contents.items()
    },
}
"""Fields whose value may change while a fingerprint stays the same."""
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


def get_identity(run: Run, fingerprint: str | None) -> dict[str, Any]:
    """Returns dotted name → value of all that must be unchanged; `fingerprint` is of the base."""
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
        **get_tokenizer_values(run.model.tokenizer),
        **{f"versions.{name}": version for name, version in library_versions().items()},
        "train.learning_rate": schedule.learning_rate,
        "train.head_learning_rate": schedule.head_learning_rate,
        "model.dtype": run.model.dtype,
        "model.device": run.model.device,
        "data.max_length": data.max_length,
        "data.overlong": data.info["overlong"],
        "data.chat_template": config.data.chat_template and Path(config.data.chat_template).name,
        BASE: fingerprint,
        ROWS: data.info["fingerprint"],
        VALIDATION: data.info.get("validation_fingerprint"),
        **{field: model.fingerprint for field, model in run.auxiliary.items()},
    }
    if data.prompt_format is not None and data.prompt_format.kind == "plain":
        values["data.prompt_version"] = data.prompt_format.version
    if run.adapter is not None:
        values[ADAPTER] = run.adapter.fingerprint
    values |= run.hooks.get_identity(run)
    if run.model.device == "cpu":  # the thread count changes the order of sums
        values["threads"] = torch.get_num_threads()
    identity: dict[str, Any] = json.loads(json.dumps(values, default=str))  # as read from the file
    return identity


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
    """Returns the differences that `--allow-change` accepts, as records for changes.jsonl.

    Raises ConfigError with all others. Fields with the digest of a file, `FIELD of FILE`, are
    accepted with FIELD. A thread count is compared if both runs are on a CPU.
    """
    ignored = {*LENGTHS, *_FREE, *({"threads"} - before.keys())}
    ignored |= {
        key
        for key, content in _MOVABLE.items()
        if now.get(content) is not None and before.get(content) == now[content]
    }
    keys = [
        key
        for key in sorted({**before, **now})
        if key not in ignored and before.get(key) != now.get(key)
    ]
    if refused := [key for key in keys if key.partition(" of ")[0] not in output.allow_change]:
        message = join_names(
            f"{key}{_CONTENTS.get(key, '')} was {before.get(key)!r} and is {now.get(key)!r}"
            for key in refused
        )
        note = f" (OMP_NUM_THREADS={before.get('threads')})" if "threads" in refused else ""
        raise ConfigError(
            f"--resume {output.dir}: not the same run: {message}. Restore it{note}, start a new "
            "run in another --output-dir, or pass --allow-change "
            f"{shlex.quote(refused[0].partition(' of ')[0])}"
        )
    return [{"field": key, "was": before.get(key), "is": now.get(key)} for key in keys]


class FileDigests:
    """SHA-256 of whole files, computed in a background thread and stored with the checkpoints.

    `files` maps fields of the identity, such as "model.fingerprint of model.safetensors", to paths.
    """

    def __init__(self, files: Mapping[str, Path], checkpoints: Path) -> None:
        self._files, self.path = files, checkpoints / DIGESTS
        self._thread: threading.Thread | None = None

    def keep(self) -> None:
        """Write the files' digests in the background, if not there yet."""
        if not self._files or self.path.exists():
            return

        def compute_and_save() -> None:
            with contextlib.suppress(MemoryError, OSError):  # reported by the run itself
                digests = self.compute()
                if self.path.parent.is_dir():
                    write_json(self.path, digests)

        self._thread = threading.Thread(target=compute_and_save, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the background thread has written the digests."""
        if self._thread is not None:
            self._thread.join()

    def compute(self) -> dict[str, str]:
        """Returns field → SHA-256 of the file now."""
        return {name: file_fingerprint(path) for name, path in self._files.items()}

    def load(self) -> dict[str, Any] | None:
        """Load the stored digests; None if they are missing or damaged."""
        try:
            return read_json(self.path) if self._files else {}
        except InputError:
            return None


def get_file_digests(run: Run, checkpoints: Path) -> FileDigests:
    """Returns the `FileDigests` of the base model."""
    path = run.model.source.path
    if path is None:
        return FileDigests({}, checkpoints)
    weights = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return FileDigests({f"{BASE} of {file.name}": file for file in weights}, checkpoints)


CONFIG, TOKENIZER, TEMPLATE = "model.config.", "model.tokenizer", "model.chat_template"
"""Names in an identity: prefix of config fields, tokenizer, chat template."""

_IGNORED_FIELDS = set(
    """
    _name_or_path transformers_version torch_dtype dtype architectures _attn_implementation
    attn_implementation id2label label2id quantization_config use_cache
    """.split()
)


def get_config_values(config: Any) -> dict[str, Any]:
    """Returns dotted name → value of all fields of `config` that affect a model's outputs."""
    return dict(_flatten(CONFIG.rstrip("."), json.loads(config.to_json_string(use_diff=False))))


def get_tokenizer_values(tokenizer: Any) -> dict[str, str]:
    """Returns digests of a tokenizer and of its chat template.

    Truncation and padding in tokenizer files are ignored: each call of the tokenizer replaces them.
    """
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        del backend["truncation"], backend["padding"]
    else:
        backend = tokenizer.get_vocab()
    return {
        TOKENIZER: _digest([backend, tokenizer.special_tokens_map]),
        TEMPLATE: _digest(getattr(tokenizer, "chat_template", None)),
    }


def _flatten(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [
            pair
            for key, inner in value.items()
            if key not in _IGNORED_FIELDS
            for pair in _flatten(f"{name}.{key}", inner)
        ]
    return [(name, value)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()
