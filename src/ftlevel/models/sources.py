"""Resolve a pretrained model: a Hub id, a directory, a .gguf file, or builtin:NAME.

Reads no weights. For a Hub id that is not cached, it probes the network once.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, Literal
from urllib.parse import urlparse

from ftlevel.artifacts.files import check_regular
from ftlevel.errors import InputError, did_you_mean, join_names
from ftlevel.models.untrusted import check_directory

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")
_TIMEOUT = 3.0
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MODELS: tuple[str, ...] = ("tiny-llama",)
"""Models shipped with the package, named `builtin:NAME`, in transformers' format."""

_BUILTIN = Path(__file__).with_name("builtin")


@dataclass(frozen=True)
class ModelSource:
    """A pretrained model that exists, and how to load it with transformers.

    `location` is a directory or Hub id; `gguf_file` a file inside it. `display_name` is the model's
    name in errors; empty means `--model NAME`.
    """

    name: str
    kind: Literal["hub", "directory", "gguf", "builtin"]
    location: str
    gguf_file: str | None = None
    revision: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    display_name: str = ""

    @property
    def label(self) -> str:
        """Name of the model in errors."""
        return self.display_name or f"--model {self.name}"

    def arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments for `from_pretrained` of config, tokenizer and model."""
        arguments: dict[str, Any] = {
            "trust_remote_code": self.trust_remote_code,
            "local_files_only": self.local_files_only,
        }
        if self.gguf_file:
            arguments["gguf_file"] = self.gguf_file
        if self.revision:
            arguments["revision"] = self.revision
        return arguments

    @property
    def path(self) -> Path | None:
        """File or directory on disk; None for a Hub id."""
        if self.kind == "hub":
            return None
        return Path(self.location) / self.gguf_file if self.gguf_file else Path(self.location)


def download_files(source: ModelSource, patterns: Sequence[str]) -> Path | None:
    """Returns a directory with the files of `source` that match `patterns`; None for a .gguf file.

    Files of a Hub model are downloaded, or offline taken from the cache; None if it is not cached.
    """
    if source.kind != "hub":
        return source.path if source.path is not None and source.path.is_dir() else None
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _download(source, patterns)
    except LocalEntryNotFoundError:
        return None


def _download(source: ModelSource, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    directory = snapshot_download(
        source.location,
        revision=source.revision,
        allow_patterns=list(patterns),
        local_files_only=source.local_files_only,
    )
    return Path(directory)


def resolve_source(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    display_name: str = "",
    *,
    require_weights: bool = True,
) -> ModelSource:
    """Returns the model source for `name`: Hub id, directory, .gguf file or builtin:NAME.

    `display_name` replaces `--model NAME` in errors. With `require_weights=False`, config.json is
    enough. Raises `InputError` if no such model can be reached.
    """
    label = display_name or f"--model {name}"
    local = partial(ModelSource, name, local_files_only=True, display_name=display_name)
    if name.startswith("builtin:"):
        return local("builtin", str(builtin_path(name.removeprefix("builtin:"))))
    path = Path(name).expanduser()
    if builtin_name := name_of_builtin(path):  # a path that PEFT wrote into adapter_config.json
        return resolve_source(builtin_name, display_name=display_name.replace(name, builtin_name))
    if path.suffix == ".gguf" and not path.is_dir():
        _check_file(path, label)
        return local("gguf", str(path.parent), path.name)
    if path.is_dir():
        _check_directory(path, label, require_weights)
        return local("directory", str(path), trust_remote_code=trust_remote_code)
    if path.exists():
        check_regular([path], label)
        raise InputError(
            f"{label} is a file. Expected a model directory, a .gguf file or a Hub id."
        )
    _check_looks_like_hub_id(name, path, label)
    offline = _check_reachable(name, revision, label)
    return ModelSource(name, "hub", name, None, revision, offline, trust_remote_code, display_name)


def check_revision(source: ModelSource, revision: str | None) -> None:
    """Raise `InputError` if a `revision` is requested of a source that is not on the Hub."""
    if revision and source.kind != "hub":
        raise InputError(
            f"revision {revision} cannot be used with {source.label}, which is a local model. Drop "
            "the revision, or use a Hub id."
        )


def _check_file(path: Path, label: str) -> None:
    if path.exists():
        check_regular([path], label)
    if not path.is_file():
        alternatives = (
            sorted(str(p) for p in path.parent.glob("*.gguf")) if path.parent.is_dir() else []
        )
        raise InputError(f"{label} does not exist.{did_you_mean(str(path), alternatives)}")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise InputError(
            f"{label} is not a GGUF file: it begins with {magic!r}, not b'GGUF'. "
            "Is the download incomplete?"
        )


def _check_directory(path: Path, label: str, require_weights: bool) -> None:
    if not (path / "config.json").is_file():
        content = join_names(sorted(p.name for p in path.iterdir()), 6) or "no files"
        if any((path / part / "adapter_config.json").is_file() for part in ("", "adapter")):
            raise InputError(
                f"{label} is an adapter, expected a model. Use the model it was trained on, or "
                f"merge both: ftlevel merge {quote(str(path))} --out NEW"
            )
        raise InputError(
            f"{label} has no config.json (it contains {content}). "
            "Expected a directory that save_pretrained wrote."
        )
    check_directory(path, label)
    if not require_weights or any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        return
    old = join_names(sorted(p.name for p in path.glob("*.bin")), 3)
    weights = f"only pickled weights ({old}), which can run code when read" if old else "no weights"
    raise InputError(
        f"{label} holds {weights}. Expected .safetensors files: save the model again with "
        "save_pretrained."
    )


def _check_looks_like_hub_id(name: str, path: Path, label: str) -> None:
    is_run = path.parts[:1] == ("runs",)  # output directory of runs, not an organization
    if _HUB_ID.fullmatch(name) and not name.startswith((".", "/", "~")) and not is_run:
        return
    parent = path.parent if path.parent.is_dir() else Path()
    names = sorted(str(p) for p in parent.iterdir() if p.is_dir())
    raise InputError(
        f"{label} does not exist.{did_you_mean(name, names)} Expected "
        f"{'the directory of a run or a model' if is_run else 'a directory'}, a .gguf file, "
        "a Hub id or builtin:tiny-llama."
    )


def _check_reachable(name: str, revision: str | None, label: str) -> bool:
    """Returns True if the Hub is offline and `name` cached, False if online; else InputError."""
    from huggingface_hub import constants, try_to_load_from_cache

    cached = isinstance(
        try_to_load_from_cache(name, "config.json", revision=revision or "main"), str
    )
    if constants.HF_HUB_OFFLINE:
        message = "HF_HUB_OFFLINE is set"
    elif not is_reachable(constants.ENDPOINT):
        message = f"{urlparse(constants.ENDPOINT).hostname} does not answer"
    else:
        return False
    if cached:
        return True
    raise InputError(
        f"{label}: no such directory, not in the local cache, and {message}. Use a local directory "
        f"or .gguf file, download it on a machine with a network (hf download {name}), or use "
        f"{'--model ' * label.startswith('--model')}builtin:tiny-llama."
    )


def is_reachable(endpoint: str) -> bool:
    """Returns whether the host of URL `endpoint` accepts a connection; True behind a proxy."""
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True
    parsed = urlparse(endpoint)
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    try:
        with socket.create_connection((parsed.hostname or "", port), timeout=_TIMEOUT):
            return True
    except OSError:
        return False


def snapshot(source: ModelSource, extra: Iterable[str] = ()) -> Path:
    """Returns a directory with config, weights and files `extra`; a Hub model is downloaded."""
    if source.kind != "hub":
        return Path(source.location)
    patterns = ["config.json", "model*.safetensors", "model.safetensors.index.json", *extra]
    return _download(source, patterns)


def name_of_builtin(model_dir: Path) -> str:
    """Returns `builtin:NAME` of the built-in model in `model_dir`, or ""."""
    root = _BUILTIN.resolve()
    path = model_dir.resolve()
    return f"builtin:{path.name}" if path.parent == root and path.name in MODELS else ""


def builtin_path(name: str) -> Path:
    """Returns the directory of `builtin:name`; raises `InputError` if unknown or incomplete."""
    if name not in MODELS:
        raise InputError(
            f"builtin:{name}: no such model in ftlevel.{did_you_mean(name, MODELS)}"
            f" Available: {join_names(f'builtin:{model}' for model in MODELS)}."
        )
    model_dir = _BUILTIN.resolve() / name
    if not (model_dir / "model.safetensors").is_file():
        raise InputError(
            f"builtin:{name}: {model_dir} has no model.safetensors, so this installation is not"
            " complete. Install ftlevel again."
        )
    return model_dir
