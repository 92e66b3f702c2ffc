"""Load the model, adapter, tokenizer and task of a `ModelRef`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.artifacts.files import base_digest, file_fingerprint, write_json
from ftlevel.artifacts.places import relative_place, resolve_relative
from ftlevel.config.preference import NO_REFERENCE
from ftlevel.data.encoding.collate import ensure_pad_token, separate_pad_from_eos
from ftlevel.data.encoding.encode import PromptFormat
from ftlevel.errors import InputError, with_article
from ftlevel.models.hardware import DTYPES
from ftlevel.models.integrity import check_missing
from ftlevel.models.kinds import model_kind
from ftlevel.models.loading import label_overrides, load_config, load_model
from ftlevel.models.quantization import (
    build_quantization_config,
    check_loadable,
    read_quantization,
    stored_quantization,
)
from ftlevel.models.targets import find_heads
from ftlevel.task import Objective
from ftlevel.tasks import TASKS, BaseTask
from ftlevel.trained.adapt import load_adapter
from ftlevel.trained.model_ref import (
    PLAIN,
    ModelRef,
    check_trained_head,
    compute_dtype,
    load_own_tokenizer,
    resolve_model,
)

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
    if not TASKS[found.card.task].generates_text:
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
            f"{said}: its tokenizer differs from that of the model that is trained, so it "
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


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model in eval mode, with its tokenizer, task and settings of training.

    `model` is a PeftModel if there is an adapter. `max_length` is that of training rows, in tokens.
    """

    model: Any
    tokenizer: Any
    task: BaseTask
    kind: str
    device: str
    dtype: str
    objective: Objective
    max_length: int
    prompt_format: PromptFormat | None
    labels: list[str] = field(default_factory=list)
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    method: str = ""

    @property
    def has_adapter(self) -> bool:
        """Whether the base can be used by disabling the adapter."""
        return hasattr(self.model, "peft_config")


def load_ref(found: ModelRef, device: str, name: str = "default") -> LoadedModel:
    """Load the model of `found`; `name` is PEFT's name of the adapter.

    Raises InputError if it is damaged, or has no head for the task.
    """
    card, source, directory = found.card, found.source, found.directory
    prompt = found.prompt_format
    options, about_reference = _own_options(card)
    task = TASKS[card.task].configured(options)
    config = load_config(source, **card_overrides(card))
    if (stored := stored_quantization(config)) is not None:
        check_loadable(stored, source.words, device)
    tokenizer = load_own_tokenizer(source, directory)
    ensure_pad_token(tokenizer)
    if task.separates_padding:
        separate_pad_from_eos(tokenizer)
    if (
        task.separates_padding or getattr(config, "pad_token_id", None) is None
    ):  # CodeGen's config lacks the field
        config.pad_token_id = tokenizer.pad_token_id
    kind = model_kind(config)
    task.prepare_tokenizer(tokenizer, kind)
    dtype, notes = compute_dtype(card, device), [*found.notes, *about_reference]
    if dtype != card.dtype:
        notes.append("trained in float16; the CPU computes it in float32")
    quant = read_quantization(card.quantization)
    whole = (
        card.method == "full" and not card.merge and card.quantization.get("kind", "none") == "none"
    )
    model, missing = load_model(
        source,
        config,
        task.auto_class(kind, config.model_type),
        dtype=DTYPES["float32" if whole else dtype],
        device=device,
        quantization=build_quantization_config(quant, DTYPES[dtype], card.heads),
    )
    if card.method == PLAIN and task.has_new_head:
        check_trained_head(missing, find_heads(model), source.name, task.name)
    # A new language head has an untrained bias, which stays zero.
    new = [*card.heads, *find_heads(model)] if card.heads and directory else []
    check_missing(missing, [*new, *task.find_unused(model)], source.words)
    if directory is not None:
        model = load_adapter(model, directory, name)
    objective = task.build_objective(kind, {"labels": card.labels, **options})
    return LoadedModel(
        model.eval(),
        tokenizer,
        task,
        kind,
        device,
        dtype,
        objective,
        card.max_length,
        prompt,
        card.labels,
        options,
        notes,
        card.method,
    )


def _own_options(card: AdapterCard) -> tuple[Mapping[str, Any], list[str]]:
    """Return the task's options, without the reference model if merged, and a note about it."""
    known = card.options.get("preference")
    if not card.merge or not known or known.get("reference", NO_REFERENCE) == NO_REFERENCE:
        return card.options, []
    alone = {**card.options, "preference": {**known, "reference": NO_REFERENCE}}
    return alone, [
        "what it was merged from is its reference no more: rewards are not scored, and "
        "the loss compares with nothing"
    ]


def card_overrides(card: AdapterCard) -> dict[str, Any]:
    """Return overrides of the base's config that shape its head as trained."""
    overrides = label_overrides(card.labels) if card.labels else {}
    if problem := card.options.get("problem_type"):
        overrides["problem_type"] = problem
        overrides.setdefault("num_labels", 1)
    return overrides
