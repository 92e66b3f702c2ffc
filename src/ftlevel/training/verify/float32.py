"""The whole model in float32 for a moment, where there is memory for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ftlevel.models.hardware import free_memory_bytes
from ftlevel.models.upstream.tensors import inner_tensors, own_tensors
from ftlevel.training.memory.shards import is_sharded

NARROW = (torch.bfloat16, torch.float16)
COPIES = 4
"""Tensors as large as what is trained that a comparison holds: two gradients, where it began, and
one that is on its way."""


@contextlib.contextmanager
def whole_in_float32(model: torch.nn.Module) -> Iterator[None]:
    """Hold every narrow weight of `model` in float32 inside the block, and the same ones after it.

    Unlike `evaluation.two_models.float32`, which widens a module while it runs, this serves a
    backward pass, threads, and functions that read the weight of a module they do not call.
    Quantized weights stay as they are, and are dequantized to float32.
    """
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    for tensor in _narrow_tensors(model):
        held.append((tensor, tensor.data))
        tensor.data = tensor.data.float()
    dtypes = [(*what, getattr(*what)) for what in _dtypes_of_4_bits(model)]
    for owner, name, _ in dtypes:
        setattr(owner, name, torch.float32)
    try:
        yield
    finally:
        for tensor, data in held:
            tensor.data = data
        for owner, name, dtype in dtypes:
            setattr(owner, name, dtype)


def fits_in_float32(model: torch.nn.Module, device: str) -> bool:
    """Whether `model`, and what comparing its gradients takes, can be held in float32 beside it.

    One that is shared out over processes cannot: FSDP2 gathers the parts that it was given.
    """
    if is_sharded(model):
        return False
    wide = sum(4 * tensor.numel() for tensor in _narrow_tensors(model))
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    return wide + COPIES * trained < free_memory_bytes(device) // 2


def _narrow_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return the parameters and buffers of half precision, each once; none that is quantized."""
    found: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for own in own_tensors(module):
            for tensor in own.values():
                if tensor is not None and tensor.dtype in NARROW and not inner_tensors(tensor):
                    found[id(tensor)] = tensor
    return list(found.values())


def _dtypes_of_4_bits(model: torch.nn.Module) -> list[tuple[Any, str]]:
    """Return whose attribute says what bitsandbytes' 4-bit linears dequantize to and compute in."""
    found: list[tuple[Any, str]] = []
    for module in model.modules():
        state = getattr(own_tensors(module)[0].get("weight"), "quant_state", None)
        if state is not None:
            found += [(module, "compute_dtype"), (state, "dtype")]
    return found
