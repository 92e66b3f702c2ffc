"""Metrics of a step on the GPU: waits, launches and memory."""

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

VIEWS = frozenset({
    "view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "expand",
    "slice", "select", "unsqueeze", "squeeze", "detach", "alias", "as_strided", "unbind", "split",
    "split_with_sizes", "lift_fresh", "empty", "empty_like", "new_empty", "unflatten", "flatten",
})  # fmt: skip
"""Operations that launch no kernel."""


class Recorder(TorchDispatchMode):
    """Counts operations on the GPU inside the block.

    Attributes:
        waits: number of host waits, by source line.
        launches: number of kernels.
        live, peak: current and maximum bytes on the GPU.
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
