"""How LoRA begins where that is not PEFT's default: inside the base, from its rows, from its loss.

PiSSA and OLoRA are PEFT's, and saved in another form (`inside_base`); LoftQ and EVA are set after
PEFT has put a plain LoRA onto the model.
"""

from __future__ import annotations

from typing import Any

from ftlevel.config.choices import Choice
from ftlevel.config.methods.lora import INSIDE_BASE, LoraSpec
from ftlevel.errors import ConfigError
from ftlevel.methods.base import Start, StartInputs
from ftlevel.methods.lora.inside_base import as_plain_lora, copy_start


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
        from ftlevel.methods.lora.loftq import start_from_residual

        start_from_residual(model, inputs.float_weights())
    if spec.init_lora_weights == "eva":
        from ftlevel.methods.lora.eva import start_from_data

        start_from_data(model, inputs.batches(), inputs.device, inputs.dtype)


def default(spec: LoraSpec) -> LoraSpec:
    """Return `spec` with PEFT's start: how it begins changes no count, and needs weights."""
    return spec.model_copy(update={"init_lora_weights": "default"})


START = Start(precision, begin, rewrites_base, copy_start, as_plain_lora, default)
