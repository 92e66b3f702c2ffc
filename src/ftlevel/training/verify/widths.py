"""The whole model in float32 or float64 for a moment, where there is memory for it."""

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
    dtypes = [(*what, getattr(*what)) for what in _dtypes_of_4_bits(model)]
    for owner, name, _ in dtypes:
        setattr(owner, name, torch.float32)
    try:
        with _held_in(torch.float32, _tensors_of(model, NARROW)):
            yield
    finally:
        for owner, name, dtype in dtypes:
            setattr(owner, name, dtype)


@contextlib.contextmanager
def whole_in_float64(model: torch.nn.Module) -> Iterator[None]:
    """Hold every weight of `model`, which is in float32, in float64 inside the block.

    What transformers computes in float32 whatever the weights are, such as a norm's mean of
    squares, stays so.
    """
    with _held_in(torch.float64, _tensors_of(model, (torch.float32,))):
        yield


@contextlib.contextmanager
def _held_in(dtype: torch.dtype, tensors: list[torch.Tensor]) -> Iterator[None]:
    """Hold `tensors` in `dtype` inside the block, and the values that they had after it."""
    held = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, data in held:
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in held:
            tensor.data = data


def fits_in_float32(model: torch.nn.Module, device: str) -> bool:
    """Whether `model`, and what comparing its gradients takes, can be held in float32 beside it.

    One that is shared out over processes cannot: FSDP2 gathers the parts that it was given.
    """
    if is_sharded(model):
        return False
    return _fits(model, torch.float32, _tensors_of(model, NARROW), device)


def fits_in_float64(model: torch.nn.Module, device: str) -> bool:
    """Whether `model`, which is in float32, can be held in float64 on `device`, and computed in.

    One with quantized weights cannot: nothing dequantizes them to it.
    """
    wide = _tensors_of(model, (torch.float32,))
    others = {id(tensor) for tensor in model.parameters()} - {id(tensor) for tensor in wide}
    if others or device == "mps":
        return False
    return _fits(model, torch.float64, wide, device)


def _fits(
    model: torch.nn.Module, dtype: torch.dtype, tensors: list[torch.Tensor], device: str
) -> bool:
    """Whether there is memory for `tensors` of `model` in `dtype`, and to compare gradients."""
    wide = sum(tensor.numel() for tensor in tensors)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return dtype.itemsize * (wide + COPIES * trained) < free_memory_bytes(device) // 2


def _tensors_of(model: torch.nn.Module, dtypes: tuple[torch.dtype, ...]) -> list[torch.Tensor]:
    """Return the parameters and buffers of `dtypes`, each once; none that is quantized."""
    found: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for own in own_tensors(module):
            for tensor in own.values():
                if tensor is not None and tensor.dtype in dtypes and not inner_tensors(tensor):
                    found[id(tensor)] = tensor
    return list(found.values())


def _dtypes_of_4_bits(model: torch.nn.Module) -> list[tuple[Any, str]]:
    """Return whose attribute says what 4-bit linears and experts dequantize to and compute in."""
    found: list[tuple[Any, str]] = []
    for module in model.modules():
        for tensor in own_tensors(module)[0].values():
            if (state := getattr(tensor, "quant_state", None)) is not None:
                found.append((state, "dtype"))
                found += [(module, "compute_dtype")] * hasattr(module, "compute_dtype")
    return found
