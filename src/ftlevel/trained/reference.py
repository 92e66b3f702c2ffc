"""Reference and teacher models: resolved before weights load, identified by a fingerprint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlevel.artifacts.files import base_digest, file_fingerprint, write_json
from ftlevel.artifacts.places import relative_path, resolve_relative
from ftlevel.errors import InputError, with_article
from ftlevel.trained.model_ref import ModelRef
from ftlevel.trained.resolve import resolve_model

NAMED = "model.json"
"""File with the name and fingerprint of the auxiliary model."""


@dataclass(frozen=True)
class ReferenceModel:
    """An auxiliary model; `fingerprint` covers all weights and their quantization."""

    name: str
    ref: ModelRef
    fingerprint: str

    def write(self, directory: Path, beside: Path) -> None:
        """Write name and fingerprint into `directory`; a local path also relative to `beside`."""
        path = Path(self.name).expanduser()
        local = {"path": relative_path(path, beside)} if path.exists() else {}
        name = str(path.absolute()) if local else self.name
        write_json(directory / NAMED, {"name": name, **local, "fingerprint": self.fingerprint})


def resolve_reference(
    flag: str, name: str, kind: str, tokenizer: Any, device: str
) -> ReferenceModel:
    """Resolve the auxiliary model `name`, and check that it can score the run's rows.

    `kind` and `tokenizer` are those of the model being trained. Raises InputError if it does not
    exist, generates no text, or has another kind or vocabulary.
    """
    said = f"{flag} {name}"
    ref = resolve_model(name, device=device, said=said)
    if not ref.configured_task.generates_text:
        raise InputError(
            f"{said} was trained for {ref.task}: it writes no text. Name one that does."
        )
    if ref.model_kind != kind:
        raise InputError(
            f"{said} is {with_article(ref.model_kind)}, and the model that is trained is "
            f"{with_article(kind)}. Name {with_article(kind)}."
        )
    if ref.load_tokenizer().get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"{said}: its tokenizer differs from that of the model that is trained, so it cannot "
            f"be used on the same tokens. Choose a model with the same tokenizer."
        )
    return ReferenceModel(name, ref, compute_fingerprint(ref))


def resolve_text_model(flag: str, name: str, device: str, dtype: str) -> ReferenceModel:
    """Resolve the embedding model `name`, whose tokenizer may be any.

    Its fingerprint covers pooling, normalization and prompts too. Raises InputError if it does not
    exist, or is no embedding model.
    """
    ref = resolve_model(name, "embedding", device=device, dtype=dtype, said=f"{flag} {name}")
    form = json.dumps([compute_fingerprint(ref), ref.card.options], sort_keys=True, default=str)
    return ReferenceModel(name, ref, hashlib.sha256(form.encode()).hexdigest())


def resolve_recorded_reference(directory: Path, beside: Path, device: str) -> ReferenceModel:
    """Resolve the model recorded in `directory`; raise InputError if its weights have changed."""
    recorded = json.loads((directory / NAMED).read_text(encoding="utf-8"))
    name = recorded["name"]
    if recorded.get("path") and (path := resolve_relative(recorded["path"], beside)).exists():
        name = str(path)
    said = f"{name} (the reference of {beside})"
    ref = resolve_model(name, device=device, said=said)
    if compute_fingerprint(ref) != recorded["fingerprint"]:
        raise InputError(
            f"{said} has other weights than in training, and rewards against it would be others. "
            "Put the former ones there, or train again."
        )
    return ReferenceModel(name, ref, recorded["fingerprint"])


def compute_fingerprint(ref: ModelRef) -> str:
    """Returns a SHA-256 of every byte of local weights, and of their quantization.

    A model on the Hub is identified by name and revision.
    """
    path, digest = ref.source.path, hashlib.sha256()
    if path is None:
        digest.update(f"{ref.base}@{ref.source.revision}".encode())
    else:
        digest.update((base_digest(path) if path.is_dir() else file_fingerprint(path)).encode())
    for pattern in ("*.safetensors", "*.bin", "adapter_config.json"):
        for file in sorted(ref.directory.glob(pattern)) if ref.directory else []:
            digest.update(f"{file.name} {file_fingerprint(file)}".encode())
    digest.update(json.dumps(ref.quantization, sort_keys=True, default=str).encode())
    return digest.hexdigest()
