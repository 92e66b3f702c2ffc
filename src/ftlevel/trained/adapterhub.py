"""Adapters that AdapterHub's `adapters` saved: read as they lie, and turned into ours in memory."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.errors import InputError
from ftlevel.methods.bottleneck.adapterhub import WEIGHTS, holders_of, read_config
from ftlevel.models.integrity import check_finite
from ftlevel.trained.adapterhub_heads import (
    HubHead,
    check_language_head,
    head_modules,
    name_head_weights,
    read_head,
)

CONFIG = "adapter_config.json"
HEAD_CONFIG = "head_config.json"
ADAPTER_FILES = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_FILES = ("model_head.safetensors", "pytorch_model_head.bin")
_HOLDER = re.compile(r"(.*)\.(?:adapters|\w+_text_(?:task|lang)_adapters)\.([^.]+)\.(.+)")


@dataclass(frozen=True)
class HubAdapter:
    """What a directory of AdapterHub's holds, without the weights of the adapter.

    Attributes:
        directory: it.
        settings: what adapter_config.json holds.
        head: the head beside the adapter, if one is there.
        head_weights: of that.
    """

    directory: Path
    settings: dict[str, Any]
    head: HubHead | None
    head_weights: dict[str, Any]

    @property
    def base(self) -> str:
        """The base model that it was trained on."""
        return str(self.settings["model_name"])

    @property
    def heads(self) -> list[str]:
        """The modules that are saved with the adapter in full."""
        return head_modules(self.head, self.head_weights) if self.head else []


def is_adapterhub(directory: Path) -> bool:
    """Whether the adapter in `directory` is in AdapterHub's form and not in PEFT's."""
    try:
        settings = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and "peft_type" not in settings and "config" in settings


def read_hub_adapter(directory: Path) -> HubAdapter:
    """Read the configuration and the head of the adapter in `directory`.

    Raises:
        InputError: it names no base, or its head is damaged or one that is not known.
    """
    settings = _read_json(directory / CONFIG)
    if not isinstance(settings.get("model_name"), str) or not settings["model_name"]:
        raise InputError(
            f"{directory / CONFIG} names no base model. Write it as model_name, a Hub id or a "
            "directory."
        )
    if not (directory / HEAD_CONFIG).is_file():
        return HubAdapter(directory, settings, None, {})
    try:
        head = read_head(_read_json(directory / HEAD_CONFIG))
    except InputError as error:
        raise InputError(f"{directory / HEAD_CONFIG}: {error}") from None
    return HubAdapter(directory, settings, head, _read_weights(directory, HEAD_FILES))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}). Was a copy cut short?") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path} holds no object. Save the adapter again with adapters.")
    return settings


def hub_task(hub: HubAdapter, task: str | None) -> str:
    """Return the task of an adapter: that of its head, or `task` where it has none.

    Raises:
        InputError: another `task` is asked of it.
    """
    own = hub.head.task if hub.head else ""
    if own and task not in (None, own):
        raise InputError(f"{hub.directory} has a head for {own}, not for {task}. Drop --task.")
    return own or task or "text-generation"


def with_head(card: AdapterCard, hub: HubAdapter) -> AdapterCard:
    """Return the card of a base with what the adapter's head knows."""
    if hub.head is None:
        return card
    options = {**card.options, **hub.head.options}
    return replace(card, labels=hub.head.labels or card.labels, options=options)


def convert(hub: HubAdapter, model: Any) -> tuple[Any, dict[str, Any]]:
    """Return PEFT's config of the adapter, and its weights by the names of PEFT's file.

    Args:
        hub: the adapter.
        model: its base, which is not changed.

    Raises:
        InputError: it is damaged, of another base, or of a kind that ftlevel does not have.
    """
    from ftlevel.methods.bottleneck.config import BottleneckConfig
    from ftlevel.methods.bottleneck.sites import site_pattern, sites_of

    try:
        fields = read_config(hub.settings, model.config)
        config = BottleneckConfig(**fields, modules_to_save=hub.heads or None)
        sites = sites_of(model.config)
        pattern = fields["target_modules"] or (sites and site_pattern(sites, config.placement))
        left_out = fields["exclude_modules"] or "(?!)"
        names = (
            name
            for name, _ in model.named_modules()
            if re.fullmatch(str(pattern), name) and not re.fullmatch(left_out, name)
        )
        holders = holders_of(names, model)
        weights = _name_weights(_read_weights(hub.directory, ADAPTER_FILES), holders, config)
        if hub.head is not None and not hub.heads:
            check_language_head(hub.head_weights, model)
        elif hub.head is not None:
            weights |= name_head_weights(hub.head, hub.head_weights, model)
    except (InputError, ValueError) as error:
        raise InputError(f"{hub.directory}: {error}") from None
    return config, {f"base_model.model.{name}": tensor for name, tensor in weights.items()}


def _name_weights(
    weights: Mapping[str, Any], holders: Mapping[str, str], config: Any
) -> dict[str, Any]:
    """Return AdapterHub's weights by our names.

    Raises:
        InputError: some are missing, or fit nothing.
    """
    groups: dict[str, dict[str, Any]] = {}
    unknown = []
    for key, tensor in weights.items():
        match = _HOLDER.fullmatch(key)
        if match is None or match[3] not in WEIGHTS.values():
            unknown.append(key)
        else:
            groups.setdefault(match[1], {})[match[3]] = tensor
    wanted = [
        our for our in WEIGHTS if our != "bottleneck_scale" or isinstance(config.scaling, str)
    ]
    named, missing = {}, []
    for name, holder in holders.items():
        path = next((p for p in groups if p == holder or p.endswith(f".{holder}")), None)
        group = groups.pop(path) if path is not None else {}
        for our in wanted:
            if WEIGHTS[our] in group:
                named[f"{name}.{our}"] = group[WEIGHTS[our]]
            else:
                missing.append(f"{name}.{our}")
    unknown += [f"{path}.{key}" for path, group in groups.items() for key in group]
    if missing or unknown:
        raise InputError(
            f"{len(missing):,} weights of the adapter are missing and {len(unknown):,} fit nothing "
            f"in the base model, such as {[*missing, *unknown][0]}. Name the base that it was "
            "trained on, or save it again with adapters 1.3.0."
        )
    return named


def _read_weights(directory: Path, names: tuple[str, str]) -> dict[str, Any]:
    """Return the tensors of the first file of `names` that is there, on the CPU.

    Raises:
        InputError: none is, or it is damaged, or holds something else than finite tensors.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = next((directory / name for name in names if (directory / name).is_file()), None)
    if path is None:
        raise InputError(f"{directory} holds neither {names[0]} nor {names[1]}. Save it again.")
    try:
        if path.suffix == ".safetensors":
            weights = load_file(str(path))
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} holds something else than tensors, which could run a program. It is not read. "
            "Save the adapter again with use_safetensors=True."
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read ({reason}). Was a copy cut short?") from None
    if not isinstance(weights, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in weights.values()
    ):
        raise InputError(f"{path} is no table of tensors. Save it again with adapters.")
    check_finite(weights.items(), str(path))
    return dict(weights)
