"""Conversion of bottleneck adapters from and to AdapterHub's format.

Based on `adapters` 1.3.0: configuration/adapter_config.py (`BnConfig`), methods/bottleneck.py,
methods/modeling.py, models/*/mixin_*.py. tests/unit/extras/test_adapterhub.py compares with
outputs of that package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ftlevel.config.methods.other import REDUCTION_FACTOR
from ftlevel.errors import InputError, join_names
from ftlevel.methods.bottleneck import AdapterPositions, block_of, get_adapter_positions

VERSION = "adapters.1.3.0"

_DEFAULTS: dict[str, Any] = {
    "original_ln_before": False, "original_ln_after": True, "ln_before": False, "ln_after": False,
    "init_weights": "bert", "init_weights_seed": None, "is_parallel": False, "scaling": 1.0,
    "use_gating": False, "residual_before_ln": True, "adapter_residual_before_ln": False,
    "inv_adapter": None, "inv_adapter_reduction_factor": None, "cross_adapter": False,
    "leave_out": [], "dropout": 0.0, "phm_layer": False, "phm_dim": 4, "factorized_phm_W": True,
    "shared_W_phm": False, "shared_phm_rule": True, "factorized_phm_rule": False,
    "phm_c_init": "normal", "phm_init_range": 0.0001, "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform", "phm_rank": 1, "phm_bias": True,
    "stochastic_depth": 0.0,
}  # fmt: skip
_REQUIRED = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
_MUST_BE = {
    "ln_before": (False, "a layer norm of its own before the adapter"),
    "ln_after": (False, "a layer norm of its own after the adapter"),
    "use_gating": (False, "a gate on the adapter"),
    "inv_adapter": (None, "an invertible adapter after the embeddings"),
    "phm_layer": (False, "Compacter's sums of Kronecker products"),
}
_PLACEMENT_KEYS = (
    "mh_adapter", "output_adapter", "cross_adapter", "is_parallel", "original_ln_before",
    "original_ln_after", "residual_before_ln",
)  # fmt: skip
_FORMERLY = ("invertible_adapter", "attention_type", "new_attention_norm")
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""Activation name of adapter-transformers, whose files have no version → transformers' name."""


@dataclass(frozen=True)
class HubModules:
    """Modules, relative to a block, in which AdapterHub puts adapters; "" is the block itself."""

    attention: tuple[str, ...]
    feed_forward: str


_IN_BLOCK = HubModules(("attention_adapters", "cross_attention_adapters"), "output_adapters")
_IN_OUTPUT = HubModules(("attention.output",), "output")

HUB_MODULES: dict[str, HubModules] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "deberta-v2"), _IN_OUTPUT),
    # The adapter after attention reads and updates the residual, which no placement does.
    "albert": HubModules((), "output_adapters"),
    **dict.fromkeys(("distilbert", "gpt2", "gptj", "llama", "mistral", "bart", "mbart"), _IN_BLOCK),
    **dict.fromkeys(("t5", "mt5"), HubModules(("", ""), "")),
}
"""Model type → modules in which AdapterHub puts adapters."""


def convert_config(config_dict: Mapping[str, Any], model_config: Any) -> dict[str, Any]:
    """Returns the `BottleneckConfig` fields equivalent to AdapterHub's adapter_config.json.

    Raises:
        InputError: a setting is not supported; the message names its keys.
    """
    positions = _load_positions(model_config)
    values = config_dict.get("config")
    if not isinstance(values, Mapping) or any(key not in values for key in _REQUIRED):
        raise InputError(
            f"config is {values if isinstance(values, str) else 'incomplete'!r}; expected an "
            f"object with {join_names(_REQUIRED)}. Save the adapter again with adapters 1.3.0."
        )
    config = {**_DEFAULTS, **values}
    _validate_config(config)
    placement = _placement(config, positions)
    self_attention, *cross = positions.attention
    modules = [self_attention] * bool(config["mh_adapter"]) + cross * bool(config["cross_adapter"])
    modules += [positions.feed_forward] * bool(config["output_adapter"])
    covers_all = placement != "houlsby" or len(modules) == len(positions.attention) + 1
    paths = "|".join(map(re.escape, modules))
    excluded = _exclude_pattern(config["leave_out"] or [], model_config)
    return {
        "placement": placement,
        "reduction_factor": _reduction_factor(config["reduction_factor"]),
        "non_linearity": _activation(config["non_linearity"], old="version" not in config_dict),
        "scaling": _scaling(config["scaling"]),
        "target_modules": None if covers_all else rf"(?:.*\.)?\d+\.(?:{paths})",
        "exclude_modules": excluded,
    }


def _load_positions(model_config: Any) -> AdapterPositions:
    positions = get_adapter_positions(model_config)
    if positions is None or model_config.model_type not in HUB_MODULES:
        raise InputError(
            f"the positions of AdapterHub's adapters in {model_config.model_type} are not known. "
            f"Families: {', '.join(HUB_MODULES)}."
        )
    return positions


def _validate_config(config: Mapping[str, Any]) -> None:
    architecture = config.get("architecture")
    if architecture is not None:
        raise InputError(
            f"architecture {architecture!r} is not a bottleneck adapter, and of AdapterHub's "
            "methods ftlevel reads these only. Train it here by --method, or use it with adapters."
        )
    problems = [
        f"{key} {config[key]!r} ({what}) is not known here"
        for key, (value, what) in _MUST_BE.items()
        if config[key] != value
    ]
    unexpected = set(config) - {*_DEFAULTS, *_REQUIRED, *_FORMERLY, "architecture"}
    problems += [f"{key} is not a key of adapters 1.3.0" for key in sorted(unexpected)]
    if config.get("invertible_adapter"):
        problems.append("invertible_adapter (an invertible adapter) is not known here")
    if problems:
        raise InputError(f"{'; '.join(problems)}. Use the adapter with adapters itself.")


def _placement(config: Mapping[str, Any], positions: AdapterPositions) -> str:
    """Returns the placement, such as `houlsby`, equivalent to `config`; InputError without one."""
    before, after = config["original_ln_before"], config["original_ln_after"]
    residual, attention = config["residual_before_ln"], config["mh_adapter"]
    if config["is_parallel"]:
        if after and config["output_adapter"] and not attention and not config["cross_adapter"]:
            return "par_bn"
    elif not before:
        if after and (attention or config["output_adapter"] or config["cross_adapter"]):
            return "houlsby" if attention or config["cross_adapter"] else "pfeiffer"
    elif config["output_adapter"] and not attention and not config["cross_adapter"]:
        if after and residual is True:
            return "seq_bn"
        if not after and residual is False:
            return "adapter_plus"
    config_dict = ", ".join(f"{key} {config[key]!r}" for key in _PLACEMENT_KEYS)
    raise InputError(
        f"an adapter with {config_dict} matches no placement. Supported are AdapterHub's "
        "double_seq_bn, seq_bn, par_bn and AdapterPlusConfig. Use it with adapters itself."
    )


def _exclude_pattern(layers: list[int], model_config: Any) -> str | None:
    """Returns a regex for modules in the blocks `layers` (encoder, then decoder); None if empty."""
    if not layers:
        return None
    if model_config.model_type == "albert" or not all(isinstance(i, int) for i in layers):
        raise InputError(f"leave_out {layers!r} is not known of {model_config.model_type}.")
    if not model_config.is_encoder_decoder:
        return rf"(?:.*\.)?(?:layers?|h)\.(?:{'|'.join(map(str, layers))})\..*"
    num_layers = getattr(model_config, "encoder_layers", None) or model_config.num_layers
    blocks = [f"encoder.{i}" if i < num_layers else f"decoder.{i - num_layers}" for i in layers]
    stacks = "|".join(name.replace(".", r"\.(?:block|layers)\.") for name in blocks)
    return rf"(?:.*\.)?(?:{stacks})\..*"


def _reduction_factor(value: Any) -> float:
    if isinstance(value, Mapping) and set(value) == {"default"}:
        value = value["default"]
    if not isinstance(value, (int, float)) or value <= 0:
        raise InputError(
            f"reduction_factor {value!r} is not one number for all layers. Use the adapter with "
            "adapters itself."
        )
    return float(value)


def _activation(name: Any, *, old: bool) -> str:
    """Returns transformers' name of an activation; `old` if `name` is adapter-transformers'."""
    from transformers.activations import ACT2FN

    activation = str(name).lower()
    activation = _OLD_ACTIVATIONS.get(activation, activation) if old else activation
    activation = {"leakyrelu": "leaky_relu"}.get(activation, activation)
    if activation not in ACT2FN:
        raise InputError(f"non_linearity {name!r} is not an activation of transformers.")
    return activation


def _scaling(value: Any) -> float | str:
    if value in ("learned", "channel") or isinstance(value, (int, float)):
        return float(value) if isinstance(value, (int, float)) else str(value)
    raise InputError(f"scaling {value!r} is not a number, learned or channel.")


def create_hub_config(peft_config: Mapping[str, Any], model_config: Any) -> dict[str, Any]:
    """Returns AdapterHub's `config` for an adapter at all positions of its placement.

    `peft_config` is adapter_config.json. Raises InputError if AdapterHub has no such adapter for
    the model type.
    """
    positions = _load_positions(model_config)
    placement = peft_config["placement"]
    if placement == "parallel" and not positions.norm:
        raise InputError(
            f"AdapterHub has no placement parallel in {model_config.model_type}: its parallel "
            "adapter reads the residual before the norm. Train with placement par_bn."
        )
    parallel = {"is_parallel": True}
    by_placement: dict[str, dict[str, Any]] = {
        "houlsby": {"mh_adapter": True, "cross_adapter": bool(model_config.is_encoder_decoder)},
        "pfeiffer": {},
        "seq_bn": {"original_ln_before": True},
        "adapter_plus": {
            "original_ln_before": True,
            "original_ln_after": False,
            "residual_before_ln": False,
        },
        "parallel": parallel,
        "par_bn": parallel,
    }
    scaling = peft_config["scaling"]
    return {
        **_DEFAULTS,
        "mh_adapter": False,
        "output_adapter": True,
        "reduction_factor": _factor_of(peft_config, model_config.hidden_size),
        "non_linearity": peft_config["non_linearity"],
        "scaling": scaling if isinstance(scaling, str) else float(scaling),
        **by_placement[placement],
    }


def _factor_of(peft_config: Mapping[str, Any], hidden: int) -> float:
    width = peft_config.get("bottleneck_dim")
    if width is None:
        return float(peft_config.get("reduction_factor") or REDUCTION_FACTOR)
    ratio = hidden / width
    return ratio if int(hidden // ratio) == width else hidden / (width + 0.5)


def get_hub_names(names: Iterator[str], model: Any) -> dict[str, str]:
    """Returns adapted module → path in AdapterHub; raises `InputError` if a module has none."""
    positions, hub_names = _load_positions(model.config), HUB_MODULES[model.config.model_type]
    prefix = f"{model.base_model_prefix}."
    paths = {}
    for name in names:
        block, hub_name = block_of(positions, name), hub_names.feed_forward
        for path, attention in zip(positions.attention, hub_names.attention, strict=False):
            if name.endswith(f".{path}"):
                block, hub_name = name.removesuffix(path), attention
        if block is None:
            raise InputError(
                f"at {name} AdapterHub's adapters of {model.config.model_type} compute something "
                "that ftlevel's do not. Use one of the feed-forward only."
            )
        paths[name] = f"{block}{hub_name}".rstrip(".").removeprefix(prefix)
    return paths


WEIGHTS = {
    "bottleneck_down.weight": "adapter_down.0.weight",
    "bottleneck_down.bias": "adapter_down.0.bias",
    "bottleneck_up.weight": "adapter_up.weight",
    "bottleneck_up.bias": "adapter_up.bias",
    "bottleneck_scale": "scaling",
}
"""Weight names in ftlevel -> names in AdapterHub."""
