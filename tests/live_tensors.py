"""Count live tensors: those saved by autograd, and all others."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Knows every storage that was made inside the block, for as long as it lives.

    Attributes:
        peak: most bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self._bytes = 0
        self.peak = 0

    def count_bytes(self) -> int:
        """Return how many bytes are alive now."""
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
        """Run `func` and count what it made."""
        made = func(*args, **(kwargs or {}))
        given = {
            part.untyped_storage()._cdata
            for part in tree_leaves((args, kwargs))
            if isinstance(part, torch.Tensor)
        }
        for part in tree_leaves(made):
            if isinstance(part, torch.Tensor) and part.untyped_storage()._cdata not in given:
                self.track(part)
        return made
