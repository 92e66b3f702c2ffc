"""LoRA initializations other than PEFT's default, and saving of PiSSA and OLoRA.

    W_res = W − s · B₀A₀,   W_res + s · BA = W + s · [B | −B₀] · [A; A₀]

PiSSA and OLoRA train on W_res; saved is a plain LoRA of rank 2r on W (PiSSA, Meng et al., 2024,
appendix C; `peft.LoraModel.subtract_mutated_init`). PEFT's conversion omits the heads, so it is
done here. LoftQ and EVA are applied to a plain LoRA that PEFT has injected.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

from ftlevel.config.methods.lora import BASE_MODIFYING_INITS, LoraSpec
from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError
from ftlevel.methods.base import Initialization, InitializationInputs

ADAPTER = "default"


def starts_inside_base(model: Any) -> bool:
    """Return whether `model` has a LoRA whose initialization changed the base weights."""
    config = getattr(model, "peft_config", {}).get(ADAPTER)
    return getattr(config, "init_lora_weights", None) in BASE_MODIFYING_INITS


def copy_start(model: Any) -> dict[str, Any]:
    """Return A₀ and B₀ of an untrained model by name; empty if they are not needed."""
    if not starts_inside_base(model):
        return {}
    return {
        name: value.detach().to("cpu", copy=True)
        for name, value in model.named_parameters()
        if f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name
    }


@contextlib.contextmanager
def as_plain_lora(model: Any, start: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """Yield the state dict to save; within the block, `model` has the matching config.

    `start` comes from `copy_start`; if empty, nothing changes and None is yielded.
    """
    if not start:
        yield None
        return
    import torch

    state = model.state_dict()
    for name, first in start.items():
        trained = state[name].cpu()
        is_a = ".lora_A." in name
        state[name] = torch.cat([trained, first if is_a else -first], dim=0 if is_a else 1)
    own = model.peft_config[ADAPTER]
    model.peft_config[ADAPTER] = _doubled(own)
    try:
        yield state
    finally:
        model.peft_config[ADAPTER] = own


def _doubled(config: Any) -> Any:
    """Return the config with twice the rank, the same scale, and default initialization."""
    config = copy.deepcopy(config)
    # The scale is alpha / r, or alpha / sqrt(r) with rsLoRA.
    factor = math.sqrt(2) if config.use_rslora else 2
    config.init_lora_weights = True
    config.r *= 2
    config.lora_alpha *= factor
    config.rank_pattern = {name: 2 * r for name, r in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {n: factor * alpha for n, alpha in (config.alpha_pattern or {}).items()}
    return config


def rewrites_base(spec: LoraSpec) -> bool:
    """Return whether initialization changes the base weights."""
    return spec.init_lora_weights in BASE_MODIFYING_INITS


def precision(spec: LoraSpec, wish: str) -> Choice | None:
    """Return float32 for PiSSA and OLoRA; raises `ConfigError` if `wish` is another dtype."""
    if not rewrites_base(spec):
        return None
    init = spec.init_lora_weights
    if wish not in ("auto", "float32"):
        raise ConfigError(
            f"--init {init} cannot be used with --dtype {wish}: it takes its start "
            "out of the base's weights, what is left is rounded, and the adapter would not be what "
            "was trained. Use --dtype float32, or --init default."
        )
    return Choice("dtype", "float32", f"auto: {init} takes its start out of the weights")


def begin(model: Any, spec: LoraSpec, inputs: InitializationInputs) -> None:
    """Initialize LoRA from training rows (eva) or from float weights (loftq) (mutated)."""
    if spec.init_lora_weights == "loftq":
        from ftlevel.methods.lora.initialization import start_from_residual

        start_from_residual(model, inputs.float_weights())
    if spec.init_lora_weights == "eva":
        from ftlevel.methods.lora.initialization import start_from_data

        start_from_data(model, inputs.batches(), inputs.device, inputs.dtype)


def default(spec: LoraSpec) -> LoraSpec:
    """Return `spec` with PEFT's default initialization, for parameter counts without weights."""
    return spec.model_copy(update={"init_lora_weights": "default"})


START = Initialization(precision, begin, rewrites_base, copy_start, as_plain_lora, default)
