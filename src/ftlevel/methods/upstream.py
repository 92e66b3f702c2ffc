"""What ftlevel uses of PEFT that it does not promise to keep, and where it was read.

As `models/upstream`: a line of `FACTS` for each name, a canary for each line in
tests/unit/methods/test_upstream.py, and PEFT is imported where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ftlevel.models.upstream import Fact

_PEFT = "0.21.2"
_TUNER, _LORA = "peft/tuners/tuners_utils.py", "peft/tuners/lora/layer.py"

FACTS = (
    Fact("PeftType", _PEFT, "peft/utils/peft_types.py",
         "a closed enumeration, and register_peft_method takes only its members"),
    Fact("get_pattern_key", _PEFT, "peft/utils/other.py",
         "which pattern of alpha_pattern a module matches"),
    Fact("unload_and_optionally_merge_module", _PEFT, "peft/utils/other.py",
         "how merge_and_unload merges wrappers and compound layers, one at a time"),
    Fact("AdaLoraLayer.ranknum", _PEFT, "peft/tuners/adalora/layer.py",
         "what AdaLoRA divides by, which is not saved"),
    Fact("RankAllocator.ipt", _PEFT, "peft/tuners/adalora/layer.py",
         "the importance scores that a resumed run goes on from"),
    Fact("RankAllocator.exp_avg_ipt", _PEFT, "peft/tuners/adalora/layer.py", "likewise"),
    Fact("RankAllocator.exp_avg_unc", _PEFT, "peft/tuners/adalora/layer.py", "likewise"),
    Fact("LoraConfig._register_custom_module", _PEFT, "peft/tuners/lora/config.py",
         "PEFT's experimental door for layers of one's own"),
    Fact("Linear._hf_tp_plan", _PEFT, "peft/tuners/lora/model.py",
         "marks a linear that is cut over several devices"),
    # subclassed in fast/layers/fused_lora
    Fact("LoraLayer.lora_variant", _PEFT, _LORA, "whether it is DoRA or another form of LoRA"),
    Fact("LoraLayer.lora_bias", _PEFT, _LORA, "whether B has a bias"),
    Fact("lora.Linear4bit", _PEFT, "peft/tuners/lora/bnb.py", "LoRA of a 4-bit linear"),
    Fact("lora.Linear8bitLt", _PEFT, "peft/tuners/lora/bnb.py", "LoRA of an 8-bit linear"),
    # overridden or inherited by our tuners
    Fact("BaseTuner._prepare_adapter_config", _PEFT, _TUNER, "which modules a tuner adapts"),
    Fact("BaseTuner._create_and_replace", _PEFT, _TUNER, "puts a layer of ours on a module"),
    Fact("BaseTuner._pre_injection_hook", _PEFT, _TUNER, "refuses what a prefix cannot stand on"),
    Fact("BaseTuner._post_injection_hook", _PEFT, _TUNER, "gives the model our attention"),
    Fact("BaseTuner._replace_module", _PEFT, _TUNER, "exchanges a module that has no weight"),
    Fact("BaseTuner._check_merge_allowed", _PEFT, _TUNER, "refuses to merge"),
    Fact("BaseTunerLayer._disable_adapters", _PEFT, _TUNER, "what disable_adapters returns"),
    Fact("BaseTunerLayer._cast_input_dtype", _PEFT, _TUNER, "the input in the adapter's precision"),
    Fact("BaseTunerLayer._get_available_adapters", _PEFT, _TUNER, "the adapters on a layer"),
)  # fmt: skip


def add_peft_type(name: str) -> Any:
    """Return the member of `peft.utils.PeftType` called `name`, made if it is not there.

    The member is made as `enum` makes its own: known by name, by value and in iteration, so that
    comparing, pickling and JSON work as for any other.
    """
    from peft import PeftType

    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType)
    member.__objclass__ = PeftType
    setattr(PeftType, name, member)  # before the maps: a member that they hold cannot be set
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def pattern_of(patterns: Iterable[str], module: str) -> str:
    """Return the first of `patterns` that the name `module` matches; `module` where none does."""
    from peft.utils.other import get_pattern_key

    return str(get_pattern_key(list(patterns), module))


def merge_layer(layer: Any) -> Any:
    """Merge an adapter's layer (mutated) and return what stays in its place.

    Raises:
        RuntimeError: PEFT cannot merge it.
    """
    if hasattr(layer, "unload_and_optionally_merge_module"):
        return layer.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=None
        )
    layer.merge()
    return layer.get_base_layer()


def freeze_ranks(model: Any) -> None:
    """Freeze the rank that AdaLoRA's update is divided by (in place).

    On a base that is not in float32 PEFT 0.21 leaves it trainable, and does not save it.
    """
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.float()


def restore_ranks(adapted: Any, config: Any) -> None:
    """Set what AdaLoRA divides by, which is not saved: the rank at the start (mutated)."""
    import torch

    for module in adapted.modules():
        if hasattr(module, "ranknum"):
            rank = torch.full((1,), float(config.init_r))
            module.ranknum["default"] = torch.nn.Parameter(rank, requires_grad=False)


def importance_scores(model: Any) -> dict[str, dict[str, Any]]:
    """Return AdaLoRA's scores of every weight, by kind and name: the dicts that it works on."""
    allocator = model.base_model.rankallocator
    return {kind: getattr(allocator, kind) for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc")}


def register_lora_layers(config: Any, layers: dict[type, Callable[..., Any]]) -> None:
    """Make a `LoraConfig` (mutated) ask `layers` first: class of a module → what builds its layer.

    Nothing of it is saved. The first entry that matches is asked, and what it declines (None) goes
    on to PEFT's own.
    """
    config._register_custom_module(layers)


def is_cut_over_devices(linear: Any) -> bool:
    """Whether transformers has cut `linear` for tensor parallelism."""
    return hasattr(linear, "_hf_tp_plan")
