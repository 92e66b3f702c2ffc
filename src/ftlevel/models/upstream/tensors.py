"""torch's private names: kernels, versions of tensors, and what a module holds."""

from __future__ import annotations

import copy
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import nn

softmax_backward = torch.ops.aten._softmax_backward_data
"""(∂L/∂P, P, axis, dtype of the scores) → ∂L/∂scores, of P = softmax(scores)."""

silu_backward = torch.ops.aten.silu_backward
gelu_backward = torch.ops.aten.gelu_backward
"""(∂L/∂y, x) → ∂L/∂x of y = silu(x), and of y = gelu(x), which takes `approximate` too."""

new_shape = torch.ops.aten._unsafe_view
"""`tensor.view(shape)` that may be written to in place; the tensor must not be used any more."""

version_of = attrgetter("_version")


def cast_together(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return `tensors` in `dtype`: what has to be cast on a GPU by one kernel."""
    if not tensors[0].is_cuda or any(tensor.dtype == dtype for tensor in tensors):
        return [tensor.to(dtype) for tensor in tensors]
    made = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(made, tensors)
    return made


def is_in_backward() -> bool:
    """Whether this thread is inside a backward pass, as what is computed again there is."""
    return bool(torch._C._current_graph_task_id() >= 0)


def order_of(node: Any) -> int:
    """Return a number of an autograd node that is larger the later it was made, in its thread."""
    return int(node._sequence_nr())


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that one of torchao's kind consists of; none for a plain tensor."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return []
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def own_tensors(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the dicts of the parameters and buffers of `module` itself, which can be written."""
    return module._parameters, module._buffers


def copy_module(module: nn.Module) -> nn.Module:
    """Return a copy that shares everything with `module`, and whose children can be replaced."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


def is_watched(module: nn.Module) -> bool:
    """Whether a hook waits for `module` to be called: an observer's, offloading's."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or hasattr(module, "_hf_hook")
    )


def cpu_has(instructions: Literal["amx_tile", "avx512_bf16"]) -> bool:
    """Whether torch finds these instructions in the processor; not every torch can tell."""
    check = getattr(torch.cpu, f"_is_{instructions}_supported", None)
    return check is not None and bool(check())
