"""Compare a resumed run with its origin: configuration, base model, data and versions.

The origin of a run is stored with its checkpoints. Its fingerprints cover samples of files;
`FileDigests` hashes all bytes, in the background of a new run and before a resumed one trains.
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
from ftlevel.artifacts.files import file_fingerprint, read_plain, write_json
from ftlevel.artifacts.run_directory import DIGESTS, ORIGIN, RunDirectory
from ftlevel.config.train import SECTIONS
from ftlevel.config.trainer import PLATEAU
from ftlevel.errors import ConfigError, join_names
from ftlevel.training.plan.run import PlannedModel, Run

BASE, ROWS = "model.fingerprint", "data.fingerprint"
"""Fields of a run's origin with fingerprints of sampled bytes."""

_CHANGES = {
    f"{name}.{fingerprint}": message
    for name, own in SECTIONS.items()
    for fingerprint, message in own.contents.values()
}
"""Field of the origin with a fingerprint, of a task's section → message if it differs."""


class FileDigests:
    """SHA-256 of whole files, computed in a background thread and stored in `file_name`.

    Attributes:
        field: field of the origin with the fingerprint of these files.
        description: name of the files in messages.
    """

    def __init__(
        self, field: str, description: str, file_name: str, files: Mapping[str, Path]
    ) -> None:
        self.field, self.description, self.file_name = field, description, file_name
        self._files = files
        self._thread: threading.Thread | None = None

    def keep(self, checkpoints: Path) -> None:
        """Write the files' digests into `checkpoints`, in the background, if not there yet."""
        if not self._files or (checkpoints / self.file_name).exists():
            return

        def compute_and_save() -> None:
            with contextlib.suppress(MemoryError, OSError):  # reported by the run itself
                digests = self._hash_files()
                if checkpoints.is_dir():
                    write_json(checkpoints / self.file_name, digests)

        self._thread = threading.Thread(target=compute_and_save, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the background thread has written the digests."""
        if self._thread is not None:
            self._thread.join()

    def changes(self, checkpoints: Path) -> dict[str, tuple[str | None, str | None]] | None:
        """Returns changed files → (old digest, new digest); None if the old digests are unknown."""
        if not self._files:
            return {}
        try:
            saved = json.loads(read_plain(checkpoints / self.file_name))
            if not isinstance(saved, dict):
                raise TypeError
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        current = self._hash_files()
        pairs = {name: (saved.get(name), current.get(name)) for name in sorted({*saved, *current})}
        return {name: (was, now) for name, (was, now) in pairs.items() if was != now}

    def forget(self, checkpoints: Path) -> None:
        """Delete the stored digests, so that a resumed run writes new ones."""
        (checkpoints / self.file_name).unlink(missing_ok=True)

    def _hash_files(self) -> dict[str, str]:
        return {name: file_fingerprint(path) for name, path in self._files.items()}


def get_file_digests(run: Run) -> tuple[FileDigests]:
    """Returns the `FileDigests` of the base model."""
    source = run.model.source
    base = [] if source.path is None else _weights(source.path)
    return (FileDigests(BASE, source.label, DIGESTS, {file.name: file for file in base}),)


def _weights(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


CONFIG, TOKENIZER, TEMPLATE = "model.config.", "model.tokenizer", "model.chat_template"
"""Names in the result of `get_model_values`: prefix of config fields, tokenizer, chat template."""

_IGNORED_FIELDS = set(
    """
    _name_or_path transformers_version torch_dtype dtype architectures _attn_implementation
    attn_implementation id2label label2id quantization_config use_cache
    """.split()
)


def get_model_values(model: PlannedModel) -> dict[str, Any]:
    """Returns dotted name → value of the base's config, and digests of tokenizer and template."""
    return get_config_values(model.config) | get_tokenizer_values(model.tokenizer)


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


def get_run_origin(run: Run, base: Mapping[str, Any]) -> dict[str, Any]:
    """Returns dotted name → value, for all that must be the same when the run resumes."""
    values: dict[str, Any] = run.config.model_dump(mode="json", exclude={"output"})
    unchecked = (
        _UNCHECKED_FIELDS
        if run.config.train.lr_scheduler_type != PLATEAU
        else _UNCHECKED_FIELDS - _EVAL_FIELDS
    )
    values["train"] = {k: v for k, v in values["train"].items() if k not in unchecked}
    values["data"] = {k: v for k, v in values["data"].items() if k not in ("num_proc", "cache")}
    values["speed"].pop("verify")
    values["train"]["learning_rate"] = run.schedule.learning_rate
    values["train"]["head_learning_rate"] = run.schedule.head_learning_rate
    values["model"] |= {"dtype": run.model.dtype, "device": run.model.device}
    values["data"]["max_length"] = run.data.max_length
    values["data"]["overlong"] = run.data.info["overlong"]
    values["data"]["fingerprint"] = run.data.info["fingerprint"]
    if run.data.prompt_format is not None and run.data.prompt_format.kind == "plain":
        values["data"]["prompt_version"] = run.data.prompt_format.version
    values["model"]["fingerprint"] = base["fingerprint"]
    if run.adapter is not None:
        values["model"]["adapter_fingerprint"] = run.adapter.fingerprint
    for (section, name), fingerprint in run.auxiliary.fingerprints().items():
        values[section][name] = fingerprint  # independent of the path
    for section, fields in run.hooks.get_origin(run).items():
        values[section] |= fields
    values["model"]["digest"] = base.get("digest")
    values["data"]["validation_fingerprint"] = run.data.info.get("validation_fingerprint")
    if template := values["data"]["chat_template"]:
        values["data"]["chat_template"] = Path(template).name
    values["versions"] = library_versions()
    flat = {"task": values.pop("task"), **get_model_values(run.model)}
    if run.model.device == "cpu":  # the thread count changes the order of sums
        flat["threads"] = torch.get_num_threads()
    flat |= {f"{section}.{k}": v for section, part in values.items() for k, v in part.items()}
    origin: dict[str, Any] = json.loads(json.dumps(flat, default=str))  # as read from the file
    return origin


def get_all_values(run: Run, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Returns dotted name → value, for all that must be the same in all processes of a run.

    These are the configuration and `origin`, except the thread count, which may differ by machine.
    """
    values = run.config.model_dump(mode="json")
    values["output"].pop("allow_change")
    flat = {"task": values.pop("task")}
    flat |= {f"{section}.{k}": v for section, part in values.items() for k, v in part.items()}
    return {**flat, **{key: value for key, value in origin.items() if key != "threads"}}


def load_origin(output_dir: RunDirectory, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Load a run's stored origin; what it cannot have is taken from `origin`."""
    before = load_origin_file(output_dir)
    if "threads" in origin:  # not stored on a GPU
        before.setdefault("threads", origin["threads"])
    if None in (before.get("model.digest"), origin.get("model.digest")):  # FileDigests stores it
        before["model.digest"] = origin["model.digest"]
    return before


def check_same_run(
    output_dir: RunDirectory, before: Mapping[str, Any], origin: Mapping[str, Any]
) -> None:
    """Raise ConfigError with all fields in which `origin` differs from the stored one, `before`."""
    keys = [key for key in {**before, **origin} if before.get(key) != origin.get(key)]
    if keys:
        message = join_names(
            _CHANGES[key]
            if key in _CHANGES and before.get(key) and origin.get(key)
            else f"{key} was {before.get(key)!r} and is {origin.get(key)!r}"
            for key in sorted(keys)
        )
        note = f" (OMP_NUM_THREADS={before.get('threads')})" if "threads" in keys else ""
        raise ConfigError(
            f"--resume {output_dir.path}: not the same run: {message}. "
            f"Restore it{note}, start a new run in another --output-dir, or pass --allow-change "
            f"{shlex.quote(sorted(keys)[0])}"
        )


def load_origin_file(output_dir: RunDirectory) -> dict[str, Any]:
    """Load the origin stored in `output_dir`; raise ConfigError if it cannot be read."""
    path = output_dir.checkpoints / ORIGIN
    try:
        origin: Any = json.loads(read_plain(path))
        if not isinstance(origin, dict):
            raise TypeError("it is not an object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"--resume: {path} cannot be read ({error}).") from None
    return origin
