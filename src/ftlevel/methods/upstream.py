"""Internals of PEFT that ftlevel uses.

As in `models/upstream`, each name has an entry in tests/upstream_facts.yaml and a test in
tests/unit/methods/test_upstream.py. PEFT is imported inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def add_peft_type(name: str) -> Any:
    """Returns the member `name` of PEFT's enumeration `PeftType`; adds it if missing."""
    from peft import PeftType

    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType)
    member.__objclass__ = PeftType
    setattr(PeftType, name, member)  # before the maps, whose members cannot be set
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register_tuner(peft_type: Any, config: type, model: type) -> None:
    """Register a tuner of ftlevel in PEFT under `peft_type`; idempotent."""
    from peft import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method

    if peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=peft_type.value.lower(), config_cls=config, model_cls=model)


def pattern_of(patterns: Iterable[str], module: str) -> str:
    """Returns the first of `patterns` that matches the module name `module`; if none, `module`."""
    from peft.utils.other import get_pattern_key

    return str(get_pattern_key(list(patterns), module))


def merge_layer(layer: Any) -> Any:
    """Merge the adapter of PEFT's `layer` into its base module; returns that module."""
    if hasattr(layer, "unload_and_optionally_merge_module"):
        return layer.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=None
        )
    layer.merge()
    return layer.get_base_layer()


def shira_indices(module: Any) -> dict[str, Any]:
    """Returns adapter name → indices of the base weights that SHiRA trains."""
    return getattr(module, "shira_indices", {})


def random_shira_mask(base_layer: Any, r: int, **kwargs: Any) -> Any:
    """Returns a random mask `(out, in)` of the weights that SHiRA trains, as PEFT draws it.

    For meta weights it is `(1, n)` with the right number of ones; the adapter file has the indices.
    """
    import torch
    from peft.tuners.shira.mask_functions import random_mask

    if base_layer.weight.is_meta:
        return torch.ones(1, r * (base_layer.in_features + base_layer.out_features))
    return random_mask(base_layer, r, **kwargs)


def copy_base_outputs(model: Any) -> None:
    """Make GraLoRA and C³A layers of `model` (modified) add to a copy of the base layer's output.

    PEFT 0.21 adds in place, which fails in autograd for quantized layers with a bias.
    """
    for module in model.modules():
        if hasattr(module, "gralora_A") or hasattr(module, "c3a_kernel"):
            module.get_base_layer().register_forward_hook(_clone_output)


def _clone_output(_module: Any, _inputs: Any, output: Any) -> Any:
    return output.clone()


def freeze_ranks(model: Any) -> None:
    """Freeze `ranknum` in `model` (modified); PEFT 0.21 trains it unless the base is float32."""
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.float()


def reset_ranks(peft_model: Any, config: Any) -> None:
    """Set AdaLoRA's `ranknum`, which is not saved, to `init_r` in `peft_model` (modified)."""
    import torch

    for module in peft_model.modules():
        if hasattr(module, "ranknum"):
            rank = torch.full((1,), float(config.init_r))
            module.ranknum["default"] = torch.nn.Parameter(rank, requires_grad=False)


def importance_scores(model: Any) -> dict[str, dict[str, Any]]:
    """Returns AdaLoRA's scores: attribute of PEFT's rank allocator → parameter name → tensor."""
    allocator = model.base_model.rankallocator
    return {name: getattr(allocator, name) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")}


def register_lora_layers(config: Any, layers: dict[type, Callable[..., Any]]) -> None:
    """Make PEFT create LoRA layers by `layers` (base layer type → class) in `config` (modified)."""
    config._register_custom_module(layers)


def is_sharded_linear(linear: Any) -> bool:
    """Returns whether `linear` is sharded by transformers' tensor parallelism."""
    return hasattr(linear, "_hf_tp_plan")
