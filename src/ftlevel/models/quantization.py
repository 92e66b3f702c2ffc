"""Quantization of base models with bitsandbytes, and of quantized checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftlevel.config.sections import QuantConfig
from ftlevel.errors import InputError
from ftlevel.models.upstream.architectures import packable_experts
from ftlevel.models.upstream.quantizers import check_environment, replaced_layers


def build_quantization_config(quant: QuantConfig, dtype: torch.dtype, heads: list[str]) -> Any:
    """Build the `BitsAndBytesConfig` for `quant`, which skips `heads`; None for kind `none`."""
    if quant.kind == "none":
        return None
    from transformers import BitsAndBytesConfig

    keep = sorted({*heads, "lm_head"})
    if quant.kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    if quant.experts:
        from ftlevel.models.upstream.experts import ExpertsConfig

    return (ExpertsConfig if quant.experts else BitsAndBytesConfig)(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.quant_type,
        bnb_4bit_use_double_quant=quant.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=keep,
    )


def packs_experts(quantization: Any) -> bool:
    """Returns whether a quantization config also packs experts in 4-bit."""
    return type(quantization).__name__ == "ExpertsConfig"  # by name, without importing its module


@dataclass(frozen=True)
class QuantizationRounding:
    """Quantizes and dequantizes tensors, so that they are rounded like the quantized base.

    Only tensors in `names` are rounded. Those in `transposed` are stored as `(in, out)`, as in
    Conv1D. `dtype` is the dtype before quantization.
    """

    names: frozenset[str]
    transposed: frozenset[str]
    quantization: Any
    dtype: torch.dtype

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """Returns `weight` in `dtype`, rounded if `name` is in `names`; integers as they are."""
        if not weight.is_floating_point():
            return weight
        weight = weight.to(self.dtype)
        if name not in self.names:
            return weight
        transposed = name in self.transposed
        rounded = self._round((weight.T if transposed else weight).contiguous())
        return rounded.T.contiguous() if transposed else rounded

    def _round(self, weight: Tensor) -> Tensor:
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


def create_rounding(model: Any, quantization: Any, dtype: torch.dtype) -> QuantizationRounding:
    """Returns the rounding that quantizing the meta `model` (modified) by `quantization` causes."""
    layers = replaced_layers(model, quantization, pre_quantized=False)
    experts: frozenset[str] = frozenset()
    if packs_experts(quantization):
        experts = frozenset(packable_experts(model))
    return QuantizationRounding(
        experts | {f"{name}.weight" for name in layers},
        frozenset(f"{name}.weight" for name, is_conv1d in layers.items() if is_conv1d),
        quantization,
        dtype,
    )


def get_quantization_config(config: Any) -> dict[str, Any] | None:
    """Returns a model config's `quantization_config` as a dict; None if it has none."""
    result = getattr(config, "quantization_config", None)
    if result is None:
        return None
    return dict(result if isinstance(result, dict) else result.to_dict())


def quantization_name(quantization_config: dict[str, Any]) -> str:
    """Returns a quantization's name, such as `4bit nf4`, `8bit` or `gptq`."""
    if quantization_config.get("load_in_8bit"):
        return "8bit"
    if quantization_config.get("load_in_4bit"):
        suffix = (
            " with double quantization"
            if quantization_config.get("bnb_4bit_use_double_quant")
            else ""
        )
        return f"4bit {quantization_config.get('bnb_4bit_quant_type', 'fp4')}{suffix}"
    return str(quantization_config.get("quant_method", "an unknown method"))


def as_quant_config(quantization_config: dict[str, Any]) -> QuantConfig | None:
    """Returns the `--quant` settings of a bitsandbytes checkpoint; None for other libraries."""
    if quantization_config.get("load_in_8bit"):
        return QuantConfig(kind="8bit")
    if quantization_config.get("load_in_4bit"):
        return QuantConfig(
            kind="4bit",
            quant_type=quantization_config.get("bnb_4bit_quant_type", "fp4"),
            double_quant=bool(quantization_config.get("bnb_4bit_use_double_quant")),
        )
    return None


def get_quantization_info(quantization_config: dict[str, Any]) -> dict[str, Any]:
    """Returns a quantization as a model-card entry: `kind`, and settings for 4-bit."""
    quant = as_quant_config(quantization_config)
    if quant is None:
        return {"kind": quantization_name(quantization_config)}
    return quant.facts


def get_quant_config(info: Mapping[str, Any]) -> QuantConfig:
    """Returns a card's entry `info` as a `QuantConfig`; kind `none` unless it is 4bit or 8bit."""
    return QuantConfig.model_validate(info) if _is_applied(info) else QuantConfig()


def format_quantization(info: Mapping[str, Any]) -> str:
    """Returns a short text, such as `4-bit nf4`, for `info`, a model card's quantization."""
    return QuantConfig.model_validate(info).form if _is_applied(info) else str(info["kind"])


def _is_applied(info: Mapping[str, Any]) -> bool:
    return info.get("kind", "none") in ("none", "4bit", "8bit")


def check_loadable(quantization_config: dict[str, Any], label: str, device: str) -> None:
    """Raise `InputError` if a quantized checkpoint cannot be loaded on this machine."""
    method = quantization_name(quantization_config)
    try:
        target = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
        check_environment(quantization_config, target)
    except (ImportError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        message = " ".join(str(error).split())
        raise InputError(
            f"{label} is quantized by {method}, which cannot be loaded here: {message} "
            "Install the package it names, or use the original model with --quant 4bit."
        ) from None
    except (TypeError, AttributeError, LookupError) as error:  # malformed config.json
        raise InputError(
            f"{label}: quantization_config in its config.json is not one of {method} ({error}). "
            "Restore the file, or use the original model with --quant 4bit."
        ) from None


def match_quantization(
    quantization_config: dict[str, Any], config: QuantConfig, label: str, device: str
) -> QuantConfig:
    """Returns the quantization of a quantized checkpoint, with `experts` as in `config`.

    Raises `InputError` if `config` requests a different one, or it cannot be loaded here.
    """
    check_loadable(quantization_config, label, device)
    stored_quant = as_quant_config(quantization_config)
    if config.kind != "none" and (stored_quant is None or stored_quant.kind != config.kind):
        raise InputError(
            f"{label} is already quantized ({quantization_name(quantization_config)}), and --quant "
            f"{config.kind} cannot be applied. Drop --quant, or use the original model."
        )
    return (stored_quant or config).model_copy(update={"experts": config.experts})
