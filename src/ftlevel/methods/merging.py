"""Merge an adapter into the base one module at a time, with PEFT's own merging code.

The base is on the meta device and only adapter layers have data. To merge a module, a copy of it
gets the base weights and PEFT merges that copy. The result equals `merge_and_unload` bit for bit,
with memory for one module.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlevel.artifacts.files import read_json
from ftlevel.errors import InputError, join_names
from ftlevel.methods import METHODS, ensure_registered
from ftlevel.methods.base import MergeInfo
from ftlevel.methods.upstream import merge_layer, shira_indices
from ftlevel.models.untrusted import check_peft_config

WEIGHTS = "adapter_model.safetensors"

BY_PEFT_TYPE: dict[str, MergeInfo] = {
    peft_type: method.merge_info
    for method in METHODS.values()
    for peft_type in method.merge_info.peft_types
}
"""PEFT type -> how its adapters are merged."""

MERGED = tuple(name for name, merge_info in BY_PEFT_TYPE.items() if merge_info.into_weights)
"""PEFT types that can be merged."""


def load_peft_config(path: Path) -> dict[str, Any]:
    """Load adapter_config.json from the directory `path`; raises `InputError` if invalid."""
    path = path / "adapter_config.json"
    config = read_json(path)
    if not isinstance(config.get("peft_type"), str):
        raise InputError(f"{path} is not the configuration of an adapter: it names no peft_type.")
    check_peft_config(path, config)
    return config


def get_merge_error(config: Mapping[str, Any]) -> str | None:
    """Returns why an adapter with `config` cannot be merged and what to do, or None."""
    peft_type = str(config.get("peft_type"))
    if peft_type not in BY_PEFT_TYPE:
        return (
            f"PEFT type {peft_type} has not been tried. Merged are {join_names(MERGED)}; for "
            "others use merge_and_unload of PEFT."
        )
    return BY_PEFT_TYPE[peft_type].get_error(config)


@dataclass(frozen=True)
class Skeleton:
    """Adapter with its weights, added to a base model without weights (on the meta device).

    Attributes:
        units: adapter layers, by name of the base module that each replaces.
        trained: trained values of other base tensors, such as biases, by name.
    """

    units: dict[str, Any]
    trained: dict[str, Any]

    def unit_of(self, name: str) -> str | None:
        """Returns the name of the adapted module that contains the base tensor `name`, or None."""
        module = name
        while module:
            module = module.rpartition(".")[0]
            if module in self.units:
                return module
        return None

    def merge(self, path: str, get_base_tensor: Callable[[str], Any]) -> dict[str, Any]:
        """Returns the merged tensors of the adapted module `path`, by name in the base model.

        `get_base_tensor` returns a writable base tensor in the output dtype, by name.

        Raises:
            InputError: PEFT cannot merge the module.
        """
        import torch
        from peft.utils import ModulesToSaveWrapper

        layer = copy.deepcopy(self.units[path])
        if not isinstance(layer, ModulesToSaveWrapper):  # a fully trained copy, such as a head
            _fill(_base_of(layer), path, get_base_tensor)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                merged = merge_layer(layer)
        except RuntimeError as error:
            raise InputError(f"{path} cannot be merged: {error}") from None
        return {f"{path}.{name}": tensor for name, tensor in merged.state_dict().items()}


def build_skeleton(model: Any, path: Path) -> Skeleton:
    """Add the adapter in the directory `path` to `model` (modified), which is on the meta device.

    Raises `InputError` if tensors of the adapter are missing or do not fit the base.
    """
    from peft import PeftConfig, get_peft_model
    from safetensors.torch import load_file

    ensure_registered()
    # Some parameters have random values even on the meta device, such as DiffLlama's lambdas.
    initial = {id(parameter): parameter for parameter in model.parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PeftConfig.from_pretrained(str(path))
        config.inference_mode = True
        merge_info = BY_PEFT_TYPE[str(config.peft_type.value)]
        merge_info.prepare(config)
        peft_model = get_peft_model(model, config, low_cpu_mem_usage=True)
        _load(peft_model, load_file(str(path / WEIGHTS)), path)
    merge_info.restore(peft_model, config)
    base = peft_model.get_base_model()
    units = dict(_iter_units(base))
    trained = {
        name: parameter
        for name, parameter in base.named_parameters(remove_duplicate=False)
        if not (parameter.is_meta or id(parameter) in initial)
        and not any(name.startswith(unit + ".") for unit in units)
    }
    _raise_for_missing(units, path)
    return Skeleton(units, trained)


def _load(peft_model: Any, tensors: dict[str, Any], path: Path) -> None:
    import torch

    from ftlevel.models.upstream.tensors import direct_tensors

    locations: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in peft_model.modules():
        for box in (*direct_tensors(module), shira_indices(module)):
            for name, tensor in box.items():
                locations.setdefault(id(tensor), []).append((box, name))
    expected = _expected_tensors(peft_model, with_embeddings=False)
    if set(expected) != set(tensors):  # PEFT also saves the base of adapted embeddings
        with_embeddings = _expected_tensors(peft_model, with_embeddings=True)
        expected |= {name: with_embeddings[name] for name in with_embeddings if name in tensors}
    if set(expected) != set(tensors):
        missing, unknown = set(expected) - set(tensors), set(tensors) - set(expected)
        raise InputError(
            f"{path}: {len(missing):,} weights of the adapter are missing and "
            f"{len(unknown):,} match no module of the base model, such as "
            f"{min(missing | unknown)}. The adapter does not belong to this base model."
        )
    for name, placeholder in expected.items():
        tensor = tensors[name]
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        for box, key in locations[id(placeholder)]:
            is_parameter = isinstance(placeholder, torch.nn.Parameter)
            box[key] = torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def _expected_tensors(peft_model: Any, *, with_embeddings: bool) -> dict[str, Any]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(
        peft_model,
        state_dict=peft_model.state_dict(keep_vars=True),
        save_embedding_layers=with_embeddings,
    )


def _iter_units(base: Any) -> Iterator[tuple[str, Any]]:
    """Yields (name, layer) of the outermost adapter layers: those that no other one contains."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    outer = ""
    for name, module in base.named_modules():
        if outer and name.startswith(outer):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            outer = name + "."
            yield name, module


def _base_of(layer: Any) -> Any:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module


def _fill(base: Any, path: str, get_base_tensor: Callable[[str], Any]) -> None:
    """Replace the meta tensors of `base` (modified), the module named `path`, by base weights."""
    import torch

    from ftlevel.models.upstream.tensors import direct_tensors

    for inner, module in base.named_modules():
        for box in direct_tensors(module):
            for key, tensor in box.items():
                if tensor is None or not tensor.is_meta:
                    continue
                value = get_base_tensor(".".join(part for part in (path, inner, key) if part))
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                box[key] = torch.nn.Parameter(value, requires_grad=False) if is_parameter else value


def _raise_for_missing(units: dict[str, Any], adapter_path: Path) -> None:
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
            f"{adapter_path}: {len(empty):,} tensors of the adapter are not in its file, such as "
            f"{join_names(empty, 2)}. Merge it with merge_and_unload of PEFT."
        )
