"""What a checkpoint that is already quantized is, and whether it can be loaded here.

bitsandbytes quantization of a frozen base: what is quantized, and how it stays trainable.

torchao's weight-only forms: one scale a row of a linear, int8 or float8 (e4m3) beside it.

torchao is an extra. Weights are packed by its own `quantize_`, a linear at a time, and flattened as
transformers' `save_pretrained` flattens them: several plain tensors, and a note in the file's
metadata of what they make.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ftlevel.config.sections import QuantConfig
from ftlevel.errors import ConfigError, InputError
from ftlevel.models.upstream.architectures import packable_experts
from ftlevel.models.upstream.quantizers import check_environment, replaced_linears


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
        from ftlevel.models.upstream.experts import ExpertsConfig

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


INSTALL = "pip install 'ftlevel[torchao]'"
_CONFIGS = {"int8-torchao": "Int8WeightOnlyConfig", "float8-torchao": "Float8WeightOnlyConfig"}


def build_torchao_config(kind: str) -> Any:
    """Return transformers' `TorchAoConfig` for `kind`.

    Raises:
        ConfigError: torchao is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            f"--quant {kind} is torchao's, which is not installed. Install it: {INSTALL}"
        )
    import torchao.quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(quant_type=getattr(torchao.quantization, _CONFIGS[kind])())


def torchao_kind(stored: dict[str, Any]) -> str | None:
    """Return the kind of a checkpoint's `quantization_config`, None if it is none of these."""
    made_by = stored.get("quant_type")
    if stored.get("quant_method") != "torchao" or not isinstance(made_by, dict):
        return None
    name = made_by.get("default", {}).get("_type")
    return next((kind for kind, config in _CONFIGS.items() if config == name), None)


def is_torchao(quantization: Any) -> bool:
    """Whether `quantization` is a `TorchAoConfig`."""
    return type(quantization).__name__ == "TorchAoConfig"


PLAIN_NOTE = '{"_type": "Tensor"}'
"""What the metadata says of a tensor that is stored as it is."""


def torchao_bytes(shape: tuple[int, ...], quantization: Any) -> int:
    """Return the bytes of a weight `(out, in)`: a byte each, a scale a row, int8's zero points."""
    name = type(quantization.quant_type).__name__
    return math.prod(shape) + shape[0] * (5 if name == _CONFIGS["int8-torchao"] else 4)


def stored_quantization(config: Any) -> dict[str, Any] | None:
    """Return the `quantization_config` of a model's config as a dict, None for a plain model."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    return dict(stored if isinstance(stored, dict) else stored.to_dict())


def quantization_name(stored: dict[str, Any]) -> str:
    """Return what a stored quantization is called: `4bit nf4`, `8bit`, `int8-torchao`, `gptq`."""
    if stored.get("load_in_8bit"):
        return "8bit"
    if stored.get("load_in_4bit"):
        double = " with double quantization" if stored.get("bnb_4bit_use_double_quant") else ""
        return f"4bit {stored.get('bnb_4bit_quant_type', 'fp4')}{double}"
    return torchao_kind(stored) or str(stored.get("quant_method", "an unknown method"))


def as_quant_config(stored: dict[str, Any]) -> QuantConfig | None:
    """Return the section that would have made a bitsandbytes checkpoint; None for others."""
    if stored.get("load_in_8bit"):
        return QuantConfig(kind="8bit")
    if stored.get("load_in_4bit"):
        return QuantConfig(
            kind="4bit",
            quant_type=stored.get("bnb_4bit_quant_type", "fp4"),
            double_quant=bool(stored.get("bnb_4bit_use_double_quant")),
        )
    return None


def quantization_facts(stored: dict[str, Any]) -> dict[str, Any]:
    """Return what a card says of a stored quantization: its `kind`, and the settings of 4 bits."""
    own = as_quant_config(stored)
    if own is None:
        return {"kind": quantization_name(stored)}
    return own.facts


def read_quantization(facts: Mapping[str, Any]) -> QuantConfig:
    """Return how a base is quantized while it loads, from what a card says.

    Other libraries' kinds are never made while loading: such a base is stored in them.
    """
    return QuantConfig.model_validate(facts) if _is_own(facts) else QuantConfig()


def quantization_form(facts: Mapping[str, Any]) -> str:
    """Return what a card says of the quantization in a few words."""
    return QuantConfig.model_validate(facts).form if _is_own(facts) else str(facts["kind"])


def _is_own(facts: Mapping[str, Any]) -> bool:
    return facts.get("kind", "none") in ("none", "4bit", "8bit")


def check_loadable(stored: dict[str, Any], words: str, device: str) -> None:
    """Refuse a quantized checkpoint that transformers cannot load here, before weights are read.

    Raises:
        InputError: naming the quantization and what is missing.
    """
    method = quantization_name(stored)
    try:
        place = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
        check_environment(stored, place)
    except (ImportError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        if stored.get("quant_method") == "torchao" and isinstance(error, ImportError):
            reason = f"torchao is not installed ({INSTALL})."
        raise InputError(
            f"{words} is quantized by {method}, which cannot be loaded here: {reason} "
            "Install what it names, or give the original model with --quant 4bit."
        ) from None
    except (TypeError, AttributeError, LookupError) as error:  # as of a stranger's file
        raise InputError(
            f"{words}: quantization_config in its config.json is not one of {method} ({error}). "
            "Restore the file, or give the original model with --quant 4bit."
        ) from None


def match_quantization(
    stored: dict[str, Any] | None, wish: QuantConfig, words: str, device: str
) -> QuantConfig:
    """Return how the base is quantized: as the user wishes, or as the checkpoint is already.

    A wish that says what the checkpoint is already changes nothing, so that a run's own config.yaml
    trains it again.

    Args:
        stored: of the checkpoint; None for a plain model.
        wish: the quant section.
        words: what errors call the model.
        device: torch device type.

    Raises:
        InputError: the checkpoint is quantized otherwise than wished, or cannot be loaded here.
    """
    if stored is None:
        return wish
    check_loadable(stored, words, device)
    own, method = as_quant_config(stored), quantization_name(stored)
    if wish.kind != "none" and (own is None or own.kind != wish.kind):
        raise InputError(
            f"{words} is quantized already ({method}), and cannot be brought to "
            f"{wish.kind} by --quant. Drop --quant, or give the original model."
        )
    return own or wish
