"""Merge an adapter into the base one module at a time, with PEFT's own merging code.

The base is on the meta device and only adapter layers have data. To merge a module, a copy of it
gets the base weights and PEFT merges that copy. The result equals `merge_and_unload` bit for bit,
with memory for one module.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlevel.errors import InputError, join_names
from ftlevel.methods import METHODS, ensure_registered
from ftlevel.methods.base import Merging
from ftlevel.methods.upstream import merge_layer, shira_indices

WEIGHTS = "adapter_model.safetensors"

BY_PEFT_TYPE: dict[str, Merging] = {
    peft_type: method.merging
    for method in METHODS.values()
    for peft_type in method.merging.peft_types
}
"""PEFT type -> how its adapters are merged."""

MERGED = tuple(name for name, merging in BY_PEFT_TYPE.items() if merging.into_weights)
"""PEFT types that can be merged."""


def read_peft_config(directory: Path) -> dict[str, Any]:
    """Load the adapter_config.json of `directory`; raises `InputError` if it is invalid."""
    path = directory / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}). Is the copy incomplete?") from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise InputError(f"{path} is no configuration of an adapter: it names no peft_type.")
    return config


def why_not_mergeable(config: Mapping[str, Any]) -> str | None:
    """Returns why an adapter with `config` cannot be merged and what to do, or None."""
    kind = str(config.get("peft_type"))
    if kind not in BY_PEFT_TYPE:
        return (
            f"PEFT type {kind} has not been tried. Merged are {join_names(MERGED)}; for others use "
            "merge_and_unload of PEFT."
        )
    return BY_PEFT_TYPE[kind].why_not(config)


@dataclass(frozen=True)
class Skeleton:
    """An adapter with its weights, on a base model on the meta device.

    `units` maps names of base modules to the adapter layers that wrap them; `supplied` maps names
    of other base tensors, such as biases, to their trained values.
    """

    units: dict[str, Any]
    supplied: dict[str, Any]

    def unit_of(self, name: str) -> str | None:
        """Returns the key of `units` whose module contains the base tensor `name`, or None."""
        module = name
        while module:
            module = module.rpartition(".")[0]
            if module in self.units:
                return module
        return None

    def merge(self, path: str, read_base: Callable[[str], Any]) -> dict[str, Any]:
        """Returns the merged tensors of the module `path` in `units`, by base tensor name.

        `read_base` returns a base tensor by name; it must be writable and in the output dtype.

        Raises:
            InputError: PEFT cannot merge it.
        """
        import torch

        layer = copy.deepcopy(self.units[path])
        if not _replaces(layer):
            _fill(_base_of(layer), path, read_base)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                merged = merge_layer(layer)
        except RuntimeError as error:
            raise InputError(f"{path} cannot be merged: {error}") from None
        return {f"{path}.{name}": tensor for name, tensor in merged.state_dict().items()}


def build_skeleton(model: Any, directory: Path) -> Skeleton:
    """Inject the adapter in `directory` into `model` (modified), a model on the meta device.

    Raises:
        InputError: tensors of the adapter are missing or do not fit the base.
    """
    from peft import PeftConfig, get_peft_model
    from safetensors.torch import load_file

    ensure_registered()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PeftConfig.from_pretrained(str(directory))
        config.inference_mode = True
        merging = BY_PEFT_TYPE[str(config.peft_type.value)]
        merging.prepare(config)
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
        tensors = load_file(str(directory / WEIGHTS))
        _load(adapted, tensors, directory)
    merging.restore(adapted, config)
    base = adapted.get_base_model()
    units = dict(_find_units(base))
    supplied = {
        name: parameter
        for name, parameter in base.named_parameters(remove_duplicate=False)
        if not parameter.is_meta and not any(name.startswith(unit + ".") for unit in units)
    }
    _check_filled(units, directory)
    return Skeleton(units, supplied)


def _load(adapted: Any, tensors: dict[str, Any], directory: Path) -> None:
    """Load all `tensors` of an adapter file into `adapted` (modified), in float32."""
    import torch

    from ftlevel.models.upstream.tensors import direct_tensors

    locations: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in adapted.modules():
        for box in (*direct_tensors(module), shira_indices(module)):
            for name, tensor in box.items():
                locations.setdefault(id(tensor), []).append((box, name))
    promised = _promised(adapted, with_embeddings=False)
    if set(promised) != set(tensors):  # PEFT also saves the base of adapted embeddings
        with_embeddings = _promised(adapted, with_embeddings=True)
        promised |= {name: with_embeddings[name] for name in with_embeddings if name in tensors}
    if set(promised) != set(tensors):
        missing, unknown = set(promised) - set(tensors), set(tensors) - set(promised)
        raise InputError(
            f"{directory}: {len(missing):,} weights of the adapter are missing and "
            f"{len(unknown):,} match no module of the base model, such as "
            f"{min(missing | unknown)}. The adapter does not belong to this base model."
        )
    for name, placeholder in promised.items():
        tensor = tensors[name]
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        for box, key in locations[id(placeholder)]:
            is_parameter = isinstance(placeholder, torch.nn.Parameter)
            box[key] = torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def _promised(adapted: Any, *, with_embeddings: bool) -> dict[str, Any]:
    """Returns the tensors of `adapted` that an adapter file contains, by their names in it."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(
        adapted,
        state_dict=adapted.state_dict(keep_vars=True),
        save_embedding_layers=with_embeddings,
    )


def _find_units(base: Any) -> Iterator[tuple[str, Any]]:
    """Yields name and module of the outermost adapter layers, in `merge_and_unload`'s order."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    inside = ""
    for name, module in base.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside = name + "."
            yield name, module


def _base_of(layer: Any) -> Any:
    """Returns the base module inside an adapter layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module


def _replaces(layer: Any) -> bool:
    """Returns whether `layer` fully replaces the base module, as a fully trained head does."""
    from peft.utils import ModulesToSaveWrapper

    return isinstance(layer, ModulesToSaveWrapper)


def _fill(base: Any, path: str, read_base: Callable[[str], Any]) -> None:
    """Load base weights into the tensors of `base` (modified) that are still on the meta device."""
    import torch

    from ftlevel.models.upstream.tensors import direct_tensors

    for inner, module in base.named_modules():
        for box in direct_tensors(module):
            for key, tensor in box.items():
                if tensor is None or not tensor.is_meta:
                    continue
                value = read_base(".".join(part for part in (path, inner, key) if part))
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                box[key] = torch.nn.Parameter(value, requires_grad=False) if is_parameter else value


def _check_filled(units: dict[str, Any], directory: Path) -> None:
    """Raise if adapter tensors in `units` got no values from the file or the base."""
    empty = []
    for path, layer in units.items():
        base_ids = {id(tensor) for tensor in _base_of(layer).parameters()}
        empty += [
            f"{path}.{name}"
            for name, tensor in layer.named_parameters()
            if tensor.is_meta
            and id(tensor) not in base_ids
            and ".original_module." not in f".{name}"
        ]
    if empty:
        raise InputError(
            f"{directory}: {len(empty):,} tensors of the adapter are not in its file, such as "
            f"{join_names(empty, 2)}. Merge it with merge_and_unload of PEFT."
        )
