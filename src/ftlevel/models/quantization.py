"""bitsandbytes quantization of a frozen base: what is quantized, and how it stays trainable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ftlevel.config.sections import QuantConfig
from ftlevel.models.upstream.experts.which import packable_experts
from ftlevel.models.upstream.quantizers import replaced_linears


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
    if quant.experts:
        from ftlevel.models.upstream.experts.quantizer import ExpertsConfig

    return (ExpertsConfig if quant.experts else BitsAndBytesConfig)(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.quant_type,
        bnb_4bit_use_double_quant=quant.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=keep,
    )


def packs_experts(quantization: Any) -> bool:
    """Whether a quantization config packs the experts of a mixture too."""
    return type(quantization).__name__ == "ExpertsConfig"  # which may not be imported


@dataclass(frozen=True)
class Rounding:
    """What quantizing and dequantizing does to the weights of a model.

    Attributes:
        names: the model's tensors that are quantized.
        transposed: those of them that are stored as (in, out), as Conv1D does.
        quantization: the `BitsAndBytesConfig`.
        dtype: precision in which the weights are loaded before they are quantized.
    """

    names: frozenset[str]
    transposed: frozenset[str]
    quantization: Any
    dtype: torch.dtype

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return `weight` as the quantized model computes with it."""
        if not weight.is_floating_point():
            return weight
        weight = weight.to(self.dtype)
        if name not in self.names:
            return weight
        turned = name in self.transposed
        rounded = self._round((weight.T if turned else weight).contiguous())
        return rounded.T.contiguous() if turned else rounded

    def _round(self, weight: torch.Tensor) -> torch.Tensor:
        import bitsandbytes.functional as bnb

        config = self.quantization
        if config.load_in_8bit:
            codes, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
            return bnb.int8_vectorwise_dequant(codes, scales).to(self.dtype)
        packed, state = bnb.quantize_4bit(
            weight,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
        )
        return bnb.dequantize_4bit(packed, state).to(self.dtype)


def build_rounding(model: Any, quantization: Any, dtype: torch.dtype) -> Rounding:
    """Return what `quantization` does to the weights of `model`, as transformers applies it.

    Args:
        model: on the meta device; its linears are replaced (mutated).
        quantization: a `BitsAndBytesConfig` that names the modules to leave alone.
        dtype: precision in which the weights are loaded.
    """
    found = replaced_linears(model, quantization, pre_quantized=False)
    experts: frozenset[str] = frozenset()
    if packs_experts(quantization):
        experts = frozenset(packable_experts(model))
    return Rounding(
        experts | {f"{name}.weight" for name in found},
        frozenset(f"{name}.weight" for name, turned in found.items() if turned),
        quantization,
        dtype,
    )
