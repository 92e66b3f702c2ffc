"""Checks of loaded weights: shapes, missing and unexpected keys, dtypes, and finite values.

Raises errors where transformers only warns or trains with a wrong model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ftlevel.errors import InputError, join_names
from ftlevel.models.module_tree import find_heads
from ftlevel.models.upstream.quantizers import scales_of
from ftlevel.models.upstream.tensors import direct_tensors, inner_tensors

_SUMMED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_LARGEST = 1e10  # the largest weights of published models are below 1e5

_STORED_FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors dtype names

Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Parameter name, shape in the checkpoint, shape in the model."""


def check_shapes(model: Any, mismatched: Iterable[Mismatch], label: str) -> list[str]:
    """Return head parameters with another shape in the checkpoint, which are newly initialized.

    Raises:
        InputError: a weight outside the heads has another shape.
    """
    heads = tuple(f"{head}." for head in find_heads(model))
    rows = sorted(mismatched)
    wrong = [row for row in rows if not row[0].startswith(heads) or not heads]
    if wrong:
        name, stored, expected = wrong[0]
        raise InputError(
            f"{label}: {len(wrong):,} weights do not have the shape given by its config.json, "
            f"such as {name}: {_by(stored)} in the checkpoint, {_by(expected)} in the model. Check "
            "that config.json belongs to the weights."
        )
    return [name for name, _, _ in rows]


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def check_unexpected(model: nn.Module, unread: Iterable[str], label: str) -> None:
    """Raise `InputError` if config.json omits layers or biases of the unexpected keys `unread`."""
    lengths = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    names = sorted(unread)
    for name in names:
        layer = re.match(r"(.+?)\.(\d+)\.", name)
        length = _find(lengths, layer[1]) if layer else None
        if layer and length is not None and int(layer[2]) >= length:
            raise InputError(
                f"{label} has weights of layer {layer[2]} ({name}), and its config.json has "
                f"{length:,} layers, counted from 0. The model would be truncated silently. Check "
                "that config.json belongs to the weights."
            )
    modules = dict(model.named_modules())
    for name in names:
        owner, _, part = name.rpartition(".")
        module = _find(modules, owner)
        if module is not None and direct_tensors(module)[0].get(part, "none") is None:
            raise InputError(
                f"{label} has {name}, and its config.json describes a model without it. Check "
                "that config.json belongs to the weights."
            )


def _find(values: Mapping[str, Any], name: str) -> Any:
    """Find the value for `name`, with or without a model prefix."""
    if name in values:
        return values[name]
    if not name:
        return None
    return next(
        (
            value
            for key, value in values.items()
            if key and (key.endswith(f".{name}") or name.endswith(f".{key}"))
        ),
        None,
    )


def check_stored_dtypes(stored: Mapping[str, str], label: str) -> None:
    """Raise `InputError` if an unquantized checkpoint has integer weights, which lack a scale."""
    packed = {
        name: dtype
        for name, dtype in stored.items()
        if name.endswith((".weight", ".bias")) and dtype not in _STORED_FLOATS
    }
    if packed:
        name, dtype = next(iter(packed.items()))
        raise InputError(
            f"{label} stores {len(packed):,} of its weights as {dtype}, such as {name}, and its "
            "config.json has no quantization_config that describes them. Download the matching "
            "config.json, or the model in floating point."
        )


def check_finite(tensors: Iterable[tuple[str, Any]], label: str) -> None:
    """Raise `InputError` for weights or scales that are NaN, infinite or larger than 1e10."""
    parts = [(name, part) for name, tensor in tensors for part in _floats(tensor)]
    if not parts:
        return
    # One pass over each tensor; large or non-finite values make the sum large or non-finite.
    # A sum may also overflow by itself, so suspects are checked again.
    sums = torch.stack([part.sum().float().cpu() for _, part in parts])
    is_sound = sums.abs() <= _LARGEST  # False for NaN
    suspects = [pair for pair, ok in zip(parts, is_sound.tolist(), strict=True) if not ok]
    largest = {name: float(part.abs().max()) for name, part in suspects if part.numel()}
    broken = [name for name, value in largest.items() if not math.isfinite(value)]
    if broken:
        raise InputError(
            f"{label} has NaN or infinity in {len(broken):,} of its tensors: "
            f"{join_names(broken, 3)}. "
            "Download or create it again."
        )
    absurd = [f"{name} ({value:.2g})" for name, value in largest.items() if value > _LARGEST]
    if absurd:
        raise InputError(
            f"{label} has numbers of more than {_LARGEST:.0e} in {len(absurd):,} of its tensors, "
            f"which is not plausible for trained weights: {join_names(absurd, 3)}. Download or "
            "create it again."
        )


def _floats(tensor: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors that `tensor` consists of."""
    yield from (scales for scales in scales_of(tensor) if scales.dtype in _SUMMED)
    if tensor.dtype in _SUMMED and not inner_tensors(tensor) and not tensor.is_meta:
        yield tensor.detach()


def check_missing(missing: list[str], allowed: list[str], label: str) -> None:
    """Raise `InputError` if weights outside the modules `allowed` are missing."""
    forbidden = [key for key in missing if not any(_inside(key, module) for module in allowed)]
    if forbidden:
        raise InputError(
            f"{label} lacks {len(forbidden)} weights of its architecture, such as "
            f"{join_names(forbidden, 3)}. They would be random. Check that config.json belongs to "
            "the weights."
        )


def _inside(key: str, module: str) -> bool:
    return key == module or key.startswith(module + ".")
