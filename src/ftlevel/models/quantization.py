"""bitsandbytes quantization of a frozen base: what is quantized, and how it stays trainable."""

from __future__ import annotations

import sys
from typing import Any

import torch

from ftlevel.config.sections import QuantConfig


def build_quantization_config(quant: QuantConfig, dtype: torch.dtype, heads: list[str]) -> Any:
    """Return the `BitsAndBytesConfig` for `quant`, or None.

    Args:
        quant: the section of the configuration.
        dtype: what the dequantized weights are multiplied in.
        heads: names of the task's heads, which are trained and therefore kept in floating point;
            transformers quantizes them unless told otherwise.
    """
    if quant.kind == "none":
        return None
    from transformers import BitsAndBytesConfig

    keep = sorted({*heads, "lm_head"})
    if quant.kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.quant_type,
        bnb_4bit_use_double_quant=quant.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=keep,
    )


def keep_trainable_layout(model: torch.nn.Module) -> int:
    """Stop 4-bit layers from repacking themselves for inference on AVX512-BF16 CPUs.

    The first forward in eval mode without gradients makes `bitsandbytes.nn.Linear4bit` rewrite
    its weight into a layout that has no autograd path: from then on training runs on with wrong
    gradients, `dequantize` and merging read garbage, and nothing is said. This must follow every
    load of 4-bit weights. Seen in bitsandbytes 0.50; a test fails when it is no longer needed.

    Returns:
        How many layers were set (mutated in place).
    """
    bnb = sys.modules.get("bitsandbytes")
    if bnb is None:  # nothing is quantized, and importing it takes a second
        return 0
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)
