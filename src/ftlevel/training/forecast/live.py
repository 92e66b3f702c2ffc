"""Bytes of tensors that are alive, by part, as operations make them and Python lets them go.

    live(t) = Σ bytes of the storages that some tensor holds at t;  peak = max over t

A storage is counted once, whatever views there are of it. What an operation takes and gives back
within itself (a kernel's workspace) is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch

from ftlevel.models.upstream.fake import OperationWatch, storage_of

ACTIVATIONS, WORKSPACE, LOGITS = "activations", "workspace", "logits"
GRADIENTS, OPTIMIZER = "gradients", "optimizer"
WEIGHTS, QUANTIZED, ADAPTER = "weights", "quantized weights", "adapter"
CASTS = "weights in 16 bits"
"""What autocast makes of trained weights, and keeps for the backward pass."""

FORWARD, BACKWARD, FIRST_BLOCK, UPDATE = "forward", "backward", "end of backward", "optimizer step"
MOMENTS = (FORWARD, BACKWARD, FIRST_BLOCK, UPDATE)

_PART_OF = {FORWARD: ACTIVATIONS, UPDATE: OPTIMIZER}


class LiveBytes(OperationWatch):
    """Counts the bytes of the tensors that live, inside the block.

    Args:
        vocabulary: last axis of what is counted as logits; 0 for none.

    Attributes:
        moment: where in a step it is; a new storage belongs to the part of its moment.
        peaks: moment → the bytes by part when most were alive in it.
        begun: whether peaks are kept, which the first steps only prepare for.
    """

    def __init__(self, vocabulary: int = 0) -> None:
        super().__init__()
        self.moment = FORWARD
        self.peaks: dict[str, Counter[str]] = {}
        self.begun = True
        self._vocabulary = vocabulary
        # A list of one: who takes a storage off is told its part after the storage has gone.
        self._held: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()
        self._alive: Counter[str] = Counter()
        self._total = 0
        self._highest: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Bytes that are alive now."""
        return self._total

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the storage of `tensor` is counted."""
        return storage_of(tensor) in self._held

    def hold(self, tensor: torch.Tensor, part: str) -> None:
        """Count the storage of `tensor` under `part`, from now on if it is known already."""
        storage = storage_of(tensor)
        size, held = storage.nbytes(), self._held.get(storage)
        if held is None:
            held = self._held[storage] = [part]
            weakref.finalize(storage, self._let_go, held, size)
        else:
            self._let_go(held, size)
            held[0] = part
        self._alive[part] += size
        self._total += size
        self._look()

    def _let_go(self, held: list[str], size: int) -> None:
        self._alive[held[0]] -= size
        self._total -= size

    def _look(self) -> None:
        if self.begun and self._total > self._highest[self.moment]:
            self._highest[self.moment] = self._total
            self.peaks[self.moment] = Counter({k: v for k, v in self._alive.items() if v})

    def made(self, tensor: torch.Tensor) -> None:
        """Count `tensor` if its storage is new."""
        if not self.knows(tensor):
            self.hold(tensor, self._part_of(tensor))

    def cast(self, tensor: torch.Tensor, result: torch.Tensor) -> None:
        """Count `result` as a cast if `tensor` is a weight."""
        held = self._held.get(storage_of(tensor))
        if held == [WEIGHTS] and not self.knows(result):
            self.hold(result, CASTS)

    def _part_of(self, tensor: torch.Tensor) -> str:
        is_scores = tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary
        if is_scores and tensor.is_floating_point() and self.moment != UPDATE:
            return LOGITS
        return _PART_OF.get(self.moment, WORKSPACE)
