"""Another model that a run asks before its first step: the reference of preferences, or a teacher.

It is found and checked before weights load. What is read of its files is a fingerprint, under which
its answers are kept, and by which a later evaluation tells that it is still the same.
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
"""The file that says which model it was."""


@dataclass(frozen=True)
class Another:
    """A model beside the one that is trained.

    Attributes:
        name: as the user gave it.
        found: what that means.
        fingerprint: of all of its weights, and of how they are quantized.
    """

    name: str
    found: ModelRef
    fingerprint: str

    def in_precision(self, dtype: str) -> Another:
        """Return it as it computes in `dtype`."""
        return replace(self, found=replace(self.found, card=replace(self.found.card, dtype=dtype)))

    def write(self, directory: Path, beside: Path) -> None:
        """Write into `directory` which one it is; a local one also by its way from `beside`."""
        path = Path(self.name).expanduser()
        local = {"path": relative_place(path, beside)} if path.exists() else {}
        name = str(path.absolute()) if local else self.name
        write_json(directory / NAMED, {"name": name, **local, "fingerprint": self.fingerprint})


def find_another(flag: str, name: str, kind: str, tokenizer: Any, device: str) -> Another:
    """Find the model called `name`, and check that it can say how likely a run's rows are.

    Args:
        flag: which names it.
        name: a run, adapter or model.
        kind: of the model that is trained.
        tokenizer: of the model that is trained.
        device: torch device type.

    Raises:
        InputError: it is not there, does not write, is of another kind or has another tokenizer.
    """
    said = f"{flag} {name}"
    found = resolve_model(name, device=device, said=said)
    if not TASKS[found.card.task].writes_text:
        raise InputError(f"{said} was trained for {found.card.task}: it writes no text. Name one "
                         "that does.")  # fmt: skip
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
    return Another(name, found, fingerprint_of(found))


def find_named(directory: Path, beside: Path, device: str) -> Another:
    """Find the model that `Another.write` named in `directory`.

    Raises:
        InputError: it is nowhere, or its weights are others.
    """
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
    return Another(places[0], found, known["fingerprint"])


def fingerprint_of(found: ModelRef) -> str:
    """Return a SHA-256 of every byte of the weights, and of how they are quantized."""
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
