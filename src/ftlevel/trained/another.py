"""Auxiliary models of a run: the reference model of preference training, or a teacher.

They are resolved and checked before weights are loaded. Their outputs are cached under a
fingerprint, by which evaluation checks that the model is unchanged.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlevel.artifacts.files import base_digest, file_fingerprint, write_json
from ftlevel.artifacts.places import relative_place, resolve_relative
from ftlevel.errors import InputError, with_article
from ftlevel.models.kinds import model_kind
from ftlevel.models.loading import load_config
from ftlevel.tasks import TASKS
from ftlevel.trained.model_ref import ModelRef, load_own_tokenizer, resolve_model

NAMED = "model.json"
"""File with the name and fingerprint of the auxiliary model."""


@dataclass(frozen=True)
class ReferenceModel:
    """An auxiliary model; `fingerprint` covers all weights and their quantization."""

    name: str
    found: ModelRef
    fingerprint: str

    def in_precision(self, dtype: str) -> ReferenceModel:
        """Return a copy that computes in `dtype`."""
        return replace(self, found=replace(self.found, card=replace(self.found.card, dtype=dtype)))

    def write(self, directory: Path, beside: Path) -> None:
        """Write name and fingerprint into `directory`; a local path also relative to `beside`."""
        path = Path(self.name).expanduser()
        local = {"path": relative_place(path, beside)} if path.exists() else {}
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
    found = resolve_model(name, device=device, said=said)
    if not TASKS[found.card.task].writes_text:
        raise InputError(
            f"{said} was trained for {found.card.task}: it writes no text. Name one that does."
        )
    if (own := model_kind(load_config(found.source))) != kind:
        raise InputError(
            f"{said} is {with_article(own)}, and the model that is trained is "
            f"{with_article(kind)}. Name {with_article(kind)}."
        )
    if load_own_tokenizer(found.source, found.directory).get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"{said}: its tokenizer is another one than that of the model that is trained, so it "
            "cannot be asked about the same tokens. Name a relative of it."
        )
    return ReferenceModel(name, found, fingerprint_of(found))


def resolve_recorded_reference(directory: Path, beside: Path, device: str) -> ReferenceModel:
    """Resolve the model recorded in `directory`; raise InputError if its weights have changed."""
    known = json.loads((directory / NAMED).read_text(encoding="utf-8"))
    places = [str(resolve_relative(known["path"], beside))] if known.get("path") else []
    places = [place for place in places if Path(place).exists()] or [known["name"]]
    said = f"{places[0]} (the reference of {beside})"
    found = resolve_model(places[0], device=device, said=said)
    if fingerprint_of(found) != known["fingerprint"]:
        raise InputError(
            f"{said} has other weights than in training, and rewards against it would be others. "
            "Put the former ones there, or train again."
        )
    return ReferenceModel(places[0], found, known["fingerprint"])


def fingerprint_of(found: ModelRef) -> str:
    """Return a SHA-256 of every byte of local weights, and of their quantization.

    A model on the Hub is identified by name and revision.
    """
    place, digest = found.source.path, hashlib.sha256()
    if place is None:
        digest.update(f"{found.source.name}@{found.source.revision}".encode())
    else:
        digest.update((base_digest(place) if place.is_dir() else file_fingerprint(place)).encode())
    for pattern in ("*.safetensors", "*.bin", "adapter_config.json"):
        for file in sorted(found.directory.glob(pattern)) if found.directory else []:
            digest.update(f"{file.name} {file_fingerprint(file)}".encode())
    digest.update(json.dumps(found.card.quantization, sort_keys=True, default=str).encode())
    return digest.hexdigest()
