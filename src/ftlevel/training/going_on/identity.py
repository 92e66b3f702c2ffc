"""What a run is made of beside its configuration, so that it goes on with the same or not at all.

All bytes of the base's weights, every field of its config.json, its tokenizer and chat template.
The weights are read in the background of a run that begins, at the speed of the disk, and before
the first step of a run that goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftlevel.artifacts.files import read_plain, write_json
from ftlevel.artifacts.fingerprint import file_fingerprint
from ftlevel.training.plan.plan import PlannedModel

CONFIG, TOKENIZER, TEMPLATE = "model.config.", "model.tokenizer", "model.chat_template"
"""Names of what `describe_model` gives; those of the config begin so."""

_FILE = "base.json"  # among the checkpoints
_SAYS_NOTHING = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures",
                 "_attn_implementation", "attn_implementation", "id2label", "label2id",
                 "quantization_config", "use_cache"}  # fmt: skip


def describe_model(model: PlannedModel) -> dict[str, Any]:
    """Return the fields of the base's config by dotted names, and digests of its tokenizer."""
    flat = dict(
        _flatten(CONFIG.rstrip("."), json.loads(model.config.to_json_string(use_diff=False)))
    )
    return flat | describe_tokenizer(model.tokenizer)


def describe_tokenizer(tokenizer: Any) -> dict[str, str]:
    """Return digests of a tokenizer and of its chat template.

    Truncation and padding are left out: some tokenizers are stored with them, as MiniLM's, each
    call sets them anew, and rows are encoded without.
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


class BaseDigest:
    """The digest of all bytes of a base's weights, made beside whatever else is done.

    Args:
        path: a model's directory or a .gguf file; None for one that is not on this disk.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found: dict[str, str] = {}
        self._thread: threading.Thread | None = None

    def keep(self, checkpoints: Path) -> None:
        """Write it into `checkpoints` once it is there, while the run begins, if none is there."""
        if (checkpoints / _FILE).exists():
            return

        def read_and_write() -> None:
            with contextlib.suppress(MemoryError, OSError):  # said where the run itself meets it
                self._read()
                if self._found and checkpoints.is_dir():
                    write_json(checkpoints / _FILE, self._found)

        self._thread = threading.Thread(target=read_and_write, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until it is written."""
        if self._thread is not None:
            self._thread.join()

    def changes(self, checkpoints: Path) -> dict[str, tuple[str | None, str | None]] | None:
        """Return file → its digest when the run began, and now, of those that are others.

        None where nobody knows how it began.
        """
        if self._path is None:  # on a hub, whose revision says it
            return {}
        try:
            before = json.loads(read_plain(checkpoints / _FILE))
            if not isinstance(before, dict):
                raise TypeError
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        self._read()
        both = {
            name: (before.get(name), self._found.get(name))
            for name in sorted({*before, *self._found})
        }
        return {name: (was, now) for name, (was, now) in both.items() if was != now}

    @staticmethod
    def forget(checkpoints: Path) -> None:
        """Let a run that goes on write it anew."""
        (checkpoints / _FILE).unlink(missing_ok=True)

    def _read(self) -> None:
        if self._path is None:
            return
        files = [self._path] if self._path.is_file() else self._path.glob("*.safetensors")
        self._found = {file.name: file_fingerprint(file) for file in sorted(files)}


def _flatten(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, inner in value.items() if key not in _SAYS_NOTHING
                for pair in _flatten(f"{name}.{key}", inner)]  # fmt: skip
    return [(name, value)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()
