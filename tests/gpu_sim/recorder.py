"""Metrics of a step on the GPU: waits, launches, memory, and time from a roofline model.

The time is computed, not measured: each operation takes as long as its bytes or its matrix products
at the rates below. Launch overhead, allocator fragmentation and scheduling are not included, nor
whether a kernel exists.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = 790e12
"""FLOP/s that an H100 reaches in bfloat16 matrix products."""

BYTES = 3.0e12
"""Memory bandwidth in bytes per second."""

ATTENTION = 350e12
"""FLOP/s of its flash attention."""

VIEWS = frozenset({
    "view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "expand",
    "slice", "select", "unsqueeze", "squeeze", "detach", "alias", "as_strided", "unbind", "split",
    "split_with_sizes", "lift_fresh", "empty", "empty_like", "new_empty", "unflatten", "flatten",
})  # fmt: skip
"""Operations that launch no kernel."""

_PRODUCTS = frozenset({"mm", "addmm", "addmm_", "bmm", "baddbmm"})
_FILLS = frozenset({"zeros", "zeros_like", "new_zeros", "fill_", "zero_", "full", "full_like",
                    "ones", "ones_like", "arange"})  # fmt: skip


class Recorder(TorchDispatchMode):
    """Counts operations on the GPU inside the block.

    Attributes:
        waits: number of host waits, by source line.
        launches: number of kernels.
        live, peak: current and maximum bytes on the GPU.
        operations: floating-point operations of products and attention.
        seconds: roofline time by kind of operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, int] = {}
        self.live = self.peak = 0
        self.reset()

    def reset(self) -> None:
        """Reset the counters, but not the memory."""
        self.waits: Counter[str] = Counter()
        self.launches = 0
        self.operations = 0.0
        self.seconds: Counter[str] = Counter()
        self.peak = self.live

    def track(self, tensor: torch.Tensor) -> None:
        """Count the storage of `tensor` once, for as long as it lives."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if tensor.device.type != "cuda" or key in self._known:
            return
        self._known[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and count `func`."""
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        inputs = [
            tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)
        ]
        on_gpu = [tensor for tensor in inputs if tensor.device.type == "cuda"]
        if on_gpu and name in ("_local_scalar_dense", "nonzero", "masked_select", "unique2"):
            self.waits[f"{name} {_source_line()}"] += 1
        if name == "_local_scalar_dense" and isinstance(inputs[0], FakeTensor):
            return {torch.bool: True}.get(inputs[0].dtype, 1)  # fake tensors have no value
        result = func(*args, **kwargs)
        outputs = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        if not outputs and name.endswith("_"):  # in place, on several tensors
            outputs = [
                tensor for tensor in tree_leaves(args[0]) if isinstance(tensor, torch.Tensor)
            ]
        if name in ("_to_copy", "copy_"):
            self._count_copy(name, args, kwargs, outputs)
        for tensor in outputs:
            self.track(tensor)
        if any(tensor.device.type == "cuda" for tensor in outputs) and name not in VIEWS:
            self.launches += 1
            adds = "add" in name and kwargs.get("beta", 1) != 0
            kind, seconds = self._time(name, args, on_gpu, outputs, adds)
            self.seconds[kind] += seconds
        return result

    def _count_copy(self, name: str, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> None:
        """Count a copy between host and GPU if the host waits for it."""
        source, target = (args[1], args[0]) if name == "copy_" else (args[0], outputs[0])
        if source.device.type == target.device.type:
            return
        waits = not (args[2] if name == "copy_" and len(args) > 2 else kwargs.get("non_blocking"))
        if waits or target.device.type == "cpu":
            direction = f"{source.device.type} to {target.device.type}"
            self.waits[f"copy {direction} {_source_line()}"] += 1

    def _time(
        self,
        name: str,
        args: Any,
        inputs: list[torch.Tensor],
        outputs: list[torch.Tensor],
        adds: bool,
    ) -> tuple[str, float]:
        """Return the kind of an operation and its roofline time in seconds.

        Args:
            name: name of the operation.
            args: its arguments.
            inputs: tensors in `args`.
            outputs: tensors it wrote.
            adds: whether a product is added to its output, which is then read too.
        """
        if name in _PRODUCTS:
            left, right = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            count = 2.0 * left.shape[-2] * left.shape[-1] * right.shape[-1]
            count *= left.shape[0] if left.dim() == 3 else 1
            self.operations += count
            moved = _size(left) + _size(right) + _size(outputs[0]) * (1 + adds)
            narrow = min(left.shape[-2], left.shape[-1], right.shape[-1]) <= 64
            kind = "narrow products" if narrow else "products"
            return kind, max(count / PRODUCTS, moved / BYTES)
        if "varlen" in name or "flash" in name or "attention" in name:
            count = _attention(args, backward="backward" in name)
            self.operations += count
            return "attention", count / ATTENTION
        moved = sum(map(_size, outputs))
        if name not in _FILLS:
            moved += sum(map(_size, inputs))
        return "rest", moved / BYTES


def _attention(args: Any, *, backward: bool) -> float:
    """Return the operations of causal attention over sequences of equal length."""
    states = [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 3]
    ends = [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 1 and len(a) > 1]
    tokens, heads, width = states[-3].shape if not backward else states[1].shape
    sequences = len(ends[0]) - 1 if ends else 1
    # Two products over half of the square, and five in the backward pass.
    return (5 if backward else 2) * 2.0 * tokens * (tokens / sequences) / 2 * heads * width


def _size(tensor: torch.Tensor) -> float:
    """Return the bytes read or written; broadcast dimensions count once."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride or length == 1 else 1
    return float(count * tensor.element_size())


def _source_line() -> str:
    """Return the innermost line of ftlevel on the stack, or of a library if there is none."""
    lines = list(_frames())
    own = [line for line in lines if line.startswith("ftlevel/")]
    return (own or [line for line in lines if not line.startswith("torch/utils/")] or ["?"])[0]


def _frames() -> Iterator[str]:
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        for mark in ("/src/", "/site-packages/"):
            if mark in path:
                yield f"{path.split(mark)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
