"""What a checkpoint that is already quantized is, and whether it can be loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ftlevel.config.sections import QuantConfig
from ftlevel.errors import InputError
from ftlevel.models.torchao_format import INSTALL, torchao_kind
from ftlevel.models.upstream.quantizers import check_environment


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
