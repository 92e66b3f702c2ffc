"""Private names of torch: kernels, tensor versions, and the tensors of a module."""

from __future__ import annotations

import contextlib
import copy
import platform
from collections.abc import Iterator
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

softmax_backward = torch.ops.aten._softmax_backward_data
"""(∂L/∂P, P, dim, input dtype) -> ∂L/∂x, for P = softmax(x)."""

silu_backward = torch.ops.aten.silu_backward
gelu_backward = torch.ops.aten.gelu_backward
"""(∂L/∂y, x) -> ∂L/∂x for y = silu(x) or gelu(x); gelu's also has `approximate`."""

VarlenLengths = tuple[Tensor, Tensor, int, int]
"""Cumulative lengths of sequences, (sequences + 1,) int32, of queries and keys; their maxima."""


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: VarlenLengths,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns attention of packed sequences on a GPU, and its LSE (heads, queries) in float32.

    `query` is (queries, heads, head_dim), `key` and `value` are (keys, key heads, head_dim),
    contiguous in the last dimension.
    """
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *lengths, 0.0, causal, False, scale=scale
    )
    return output, lse


def flash_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    lengths: VarlenLengths,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of the queries, keys and values of `flash_attention`."""
    unused = torch.empty(2, dtype=torch.uint64, device=query.device)  # state of dropout
    of_states: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        gradient, query, key, value, output, lse, *lengths, 0.0, causal, unused, unused, scale=scale
    )
    return of_states


new_shape = torch.ops.aten._unsafe_view
"""`tensor.view(shape)` that may be modified in place; `tensor` must not be used afterwards."""

submodules_of = attrgetter("_modules")
"""Module -> dict of its submodules; reading it takes a quarter of the time of an attribute."""

version_of = attrgetter("_version")


_stands_for_gpu = False


def is_on_gpu(tensor: Tensor) -> bool:
    """Returns whether `tensor` is on a GPU; True for all tensors in an `as_gpu` block."""
    return tensor.is_cuda or _stands_for_gpu


@contextlib.contextmanager
def as_gpu(is_gpu: bool) -> Iterator[None]:
    """Take the path of a GPU in the `with` block if `is_gpu`, with tensors that have no values."""
    global _stands_for_gpu
    _stands_for_gpu = is_gpu
    try:
        yield
    finally:
        _stands_for_gpu = False


def set_allocator(settings: str) -> None:
    """Change the settings of torch's GPU allocator, even after CUDA was initialized."""
    if hasattr(torch._C, "_accelerator_setAllocatorSettings"):
        torch._C._accelerator_setAllocatorSettings(settings)
    else:  # before torch 2.10
        torch.cuda.memory._set_allocator_settings(settings)


def cast_together(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Returns `tensors` cast to `dtype`; on a GPU, one kernel casts them all."""
    if not tensors[0].is_cuda or any(tensor.dtype == dtype for tensor in tensors):
        return [tensor.to(dtype) for tensor in tensors]
    results = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(results, tensors)
    return results


def packed_dtypes() -> set[torch.dtype]:
    """Returns the dtypes of linear layers whose weights `pack_linear` packs on this machine."""
    is_available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if platform.machine() not in ("x86_64", "AMD64") or not is_available:
        return set()  # oneDNN on other processors was not tried
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return {torch.float32, torch.bfloat16} if has_bfloat16 else {torch.float32}


def pack_linear(weight: Tensor, rows: int) -> Tensor:
    """Returns `weight` (out, in) in oneDNN's layout for inputs of about `rows` rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Returns the linear layer of `x` (…, in) with a weight from `pack_linear`."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def is_in_backward() -> bool:
    """Returns whether this thread is in a backward pass, including recomputation."""
    return bool(torch._C._current_graph_task_id() >= 0)


def order_of(node: Any) -> int:
    """Returns the sequence number of an autograd node; later nodes of a thread have larger ones."""
    return int(node._sequence_nr())


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """Returns the tensors of a tensor subclass, as in torchao; empty for a plain tensor."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return []
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def direct_tensors(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the dicts, not copies, of the parameters and buffers of `module` itself."""
    return module._parameters, module._buffers


def copy_module(module: nn.Module) -> nn.Module:
    """Returns a shallow copy of `module` whose children can be replaced."""
    result = copy.copy(module)
    result._modules = dict(module._modules)
    return result


def is_watched(module: nn.Module, ignored: str = "") -> bool:
    """Returns whether `module` has hooks, such as those of an observer or of offloading.

    Hooks from modules whose names begin with `ignored` do not count.
    """
    attributes = vars(module)
    hooks = [hook for kind in _HOOKS if (own := attributes[kind]) for hook in own.values()]
    names = [getattr(hook, "__module__", "") for hook in hooks]
    return "_hf_hook" in attributes or not all(
        ignored and name.startswith(ignored) for name in names
    )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def cpu_has(instructions: Literal["amx_tile", "avx512_bf16"]) -> bool:
    """Returns whether the CPU has these `instructions`; False if torch cannot tell."""
    check = getattr(torch.cpu, f"_is_{instructions}_supported", None)
    return check is not None and bool(check())
