"""What ftlevel did not train: plain PEFT adapters and models, with cards that stand in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.artifacts.files import check_regular
from ftlevel.data.encoding.pad_token import choose_pad_token
from ftlevel.errors import InputError
from ftlevel.models.hardware import choose_dtype
from ftlevel.models.kinds import max_positions, model_kind
from ftlevel.models.loading import load_config, load_tokenizer
from ftlevel.models.sources import ModelSource, resolve_source
from ftlevel.tasks import BaseTask
from ftlevel.trained.base import base_words

ADAPTER_CONFIG = "adapter_config.json"
PLAIN = "none"
"""The method of a model that has no adapter."""


def read_plain_adapter(
    directory: Path, place: str | None = None, base_source: ModelSource | None = None
) -> tuple[ModelSource, dict[str, Any]]:
    """Return the base of the PEFT adapter in `directory`, and its configuration.

    Args:
        directory: where the adapter is.
        place: where the user says that the base is now.
        base_source: its base, where that is known; None for what the configuration names.

    Raises:
        InputError: the configuration is unreadable, names no base, or the base is not there.
    """
    path = directory / ADAPTER_CONFIG
    check_regular(directory.iterdir(), str(directory))
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}). Was a copy cut short?") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path} is no configuration of an adapter. Expected an object.")
    base = settings.get("base_model_name_or_path")
    if base_source is None and not (base and isinstance(base, str)):
        raise InputError(f"{path} names no base model. Write it as base_model_name_or_path.")
    if not (directory / "adapter_model.safetensors").is_file():
        raise InputError(
            f"{directory} holds no adapter_model.safetensors. Save the adapter again with PEFT's "
            "save_pretrained."
        )
    if base_source is not None:
        return base_source, settings
    return resolve_plain_base(str(base), directory, settings.get("revision"), place), settings


def resolve_plain_base(
    base: str, directory: Path, revision: str | None = None, place: str | None = None
) -> ModelSource:
    """Return the base that an adapter of another program names, or the user in its place."""
    if place is not None:
        return resolve_source(place, said=f"--model {place}")
    return resolve_source(base, revision, said=base_words(str(directory), base))


def stand_in_card(
    source: ModelSource,
    task: BaseTask,
    device: str,
    directory: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> AdapterCard:
    """Return what a card would say of a model, or of a PEFT adapter on it.

    Prompts are laid out as `train` would. Classes are those that the config names.

    Args:
        source: the base, or the model.
        task: what it is used for.
        device: torch device type.
        directory: of the adapter, which may have a tokenizer of its own.
        settings: the adapter's configuration; None for a model.
    """
    config = load_config(source)
    kind = model_kind(config)
    task.auto_class(kind, config.model_type)  # refuses a task that the model cannot have
    own = directory is not None and (directory / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(
        ModelSource(str(directory), "directory", str(directory)) if own else source
    )
    choose_pad_token(tokenizer)
    known = task.stand_in(config, tokenizer, kind)
    return AdapterCard(
        method=str(settings["peft_type"]).lower() if settings else PLAIN,
        task=task.name,
        base={"name": source.name, "kind": source.kind, "revision": source.revision},
        quantization={"kind": "none"},
        dtype=choose_dtype("auto", device, "lora", config.model_type).value,
        max_length=max_positions(config) or 0,
        **known,
        heads=list((settings or {}).get("modules_to_save") or ()),
    )


def check_trained_head(missing: Sequence[str], heads: Sequence[str], name: str, task: str) -> None:
    """Refuse a model whose head for `task` would be random.

    Raises:
        InputError: weights of a head are missing from the checkpoint.
    """
    lost = [key for key in missing if any(key.startswith(f"{head}.") for head in heads)]
    if lost:
        raise InputError(
            f"{name} has no trained head for --task {task} ({lost[0]} is missing). Name a model or "
            f"a run that was trained for it: ftlevel train --task {task} --model {name} …"
        )
