"""How LoRA begins where that is not PEFT's default: inside the base, from its rows, from its loss.

PiSSA and OLoRA are PEFT's, and saved in another form (`inside_base`); LoftQ and EVA are set after
PEFT has put a plain LoRA onto the model.

LoRA that begins inside the base's weights (PiSSA, OLoRA), and its form for the untouched base.

These take A₀ and B₀ out of W and train on what is left, W_res = W − s · B₀A₀. Trained, the weight
is W_res + s · BA = W + s · [B | −B₀] · [A; A₀]: a plain LoRA of rank 2r on W itself, the conversion
of `peft.LoraModel.subtract_mutated_init` (PiSSA, Meng et al., 2024, appendix C). PEFT's own way to
it leaves out the heads, so the tensors are put together here.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

from ftlevel.config.methods.lora import INSIDE_BASE, LoraSpec
from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError
from ftlevel.methods.base import Start, StartInputs

ADAPTER = "default"


def starts_inside_base(model: Any) -> bool:
    """Whether `model` has a LoRA whose start was taken out of the base's weights."""
    config = getattr(model, "peft_config", {}).get(ADAPTER)
    return getattr(config, "init_lora_weights", None) in INSIDE_BASE


def copy_start(model: Any) -> dict[str, Any]:
    """Return A₀ and B₀ of an untrained model by their names, empty if they do not matter."""
    if not starts_inside_base(model):
        return {}
    return {
        name: value.detach().to("cpu", copy=True)
        for name, value in model.named_parameters()
        if f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name
    }


@contextlib.contextmanager
def as_plain_lora(model: Any, start: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """Give the state dict to save; inside the block `model` has the config that belongs to it.

    Args:
        model: the trained model.
        start: what `copy_start` returned; empty leaves everything as it is, and gives None.
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
    """Return the config of twice the rank and the same scale, with PEFT's default start."""
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
    """Whether the start is taken out of the base's weights."""
    return spec.init_lora_weights in INSIDE_BASE


def precision(spec: LoraSpec, wish: str) -> Choice | None:
    """Return float32 for a start inside the weights, which anything shorter would round.

    Raises:
        ConfigError: the user wants another.
    """
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


def begin(model: Any, spec: LoraSpec, inputs: StartInputs) -> None:
    """Give LoRA its start from the training rows (eva) or from the float weights (loftq; mutated).

    For loftq the float model is held beside the quantized one until its start is set.
    """
    if spec.init_lora_weights == "loftq":
        from ftlevel.methods.lora.initialization import start_from_residual

        start_from_residual(model, inputs.float_weights())
    if spec.init_lora_weights == "eva":
        from ftlevel.methods.lora.initialization import start_from_data

        start_from_data(model, inputs.batches(), inputs.device, inputs.dtype)


def default(spec: LoraSpec) -> LoraSpec:
    """Return `spec` with PEFT's start: how it begins changes no count, and needs weights."""
    return spec.model_copy(update={"init_lora_weights": "default"})


START = Start(precision, begin, rewrites_base, copy_start, as_plain_lora, default)
