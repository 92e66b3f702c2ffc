"""Internals of PEFT that ftlevel uses, and the source files where they are defined.

As in `models/upstream`, each name has an entry in `FACTS` and a test in
tests/unit/methods/test_upstream.py. PEFT is imported inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

FACTS = {
    "peft/utils/peft_types.py": {
        "PeftType": "a closed enumeration, and register_peft_method takes only its members"
    },
    "peft/utils/other.py": {
        "get_pattern_key": "which pattern of alpha_pattern a module matches",
        "unload_and_optionally_merge_module": "how merge_and_unload merges, one layer at a time",
    },
    "peft/tuners/adalora/layer.py": {
        "AdaLoraLayer.ranknum": "what AdaLoRA divides by, which is not saved",
        "RankAllocator.ipt, RankAllocator.exp_avg_ipt, RankAllocator.exp_avg_unc": "its scores",
    },
    "peft/tuners/lora/config.py": {
        "LoraConfig._register_custom_module": "PEFT's experimental registration of custom layers"
    },
    "peft/tuners/lora/model.py": {
        "Linear._hf_tp_plan": "marks a linear layer sharded across devices"
    },
    "peft/tuners/lora/layer.py": {  # subclassed in fast/layers/fused_lora
        "LoraLayer.lora_variant": "whether it is DoRA or another form of LoRA",
        "LoraLayer.lora_bias": "whether B has a bias",
    },
    "peft/tuners/lora/bnb.py": {"lora.Linear4bit, lora.Linear8bitLt": "LoRA of a quantized linear"},
    "peft/tuners/gralora/layer.py": {
        "GraloraLayer.get_base_layer": "its output is added to in place"
    },
    "peft/tuners/c3a/layer.py": {"C3ALayer.get_base_layer": "its output is added to in place"},
    "peft/tuners/shira/layer.py": {
        "ShiraLayer.shira_indices": "the trained positions, in a dict outside of modules"
    },
    "peft/tuners/shira/mask_functions.py": {
        "random_mask": "samples the positions, but not on the meta device"
    },
    "peft/tuners/tuners_utils.py": {  # overridden or inherited by our tuners
        "BaseTuner._prepare_adapter_config": "which modules a tuner adapts",
        "BaseTuner._create_and_replace": "replaces a module with our layer",
        "BaseTuner._pre_injection_hook": "rejects modules that cannot have a prefix",
        "BaseTuner._replace_module": "replaces a module that has no weight",
        "BaseTuner._check_merge_allowed": "refuses to merge",
        "BaseTuner._cast_adapter_dtype": "casts an adapter to float32, or leaves it",
        "BaseTunerLayer._move_adapter_to_device_of_base_layer": "after loading on the meta device",
        "BaseTunerLayer._disable_adapters": "what disable_adapters returns",
        "BaseTunerLayer._cast_input_dtype": "the input in the adapter's precision",
        "BaseTunerLayer._get_available_adapters": "the adapters on a layer",
    },
}


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
