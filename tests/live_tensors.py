"""Count live tensors: those saved by autograd, and all others."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Tracks storages that are created inside the block.

    Attributes:
        peak: largest number of live bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self._bytes = 0
        self.peak = 0

    def count_bytes(self) -> int:
        """Return the current number of live bytes."""
        return self._bytes

    def track(self, tensor: torch.Tensor) -> None:
        """Count the storage of `tensor`, once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = size
        self._bytes += size
        self.peak = max(self.peak, self._bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._bytes -= self._alive.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and track its outputs."""
        output = func(*args, **(kwargs or {}))
        argument_storages = {
            value.untyped_storage()._cdata
            for value in tree_leaves((args, kwargs))
            if isinstance(value, torch.Tensor)
        }
        for value in tree_leaves(output):
            if (
                isinstance(value, torch.Tensor)
                and value.untyped_storage()._cdata not in argument_storages
            ):
                self.track(value)
        return output
