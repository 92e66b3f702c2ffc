"""What a step asks of the card: waits, launches, memory, and a time by a roofline.

The time is computed, not measured: each operation takes as long as its bytes or its products do at
the rates below. What a kernel's launch, the allocator's fragments or another schedule add is not
seen, and neither is whether a kernel exists.
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
"""Operations a second that an H100's bfloat16 products reach."""

BYTES = 3.0e12
"""Bytes a second of its memory."""

ATTENTION = 350e12
"""Operations a second of its flash attention."""

VIEWS = frozenset({
    "view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "expand",
    "slice", "select", "unsqueeze", "squeeze", "detach", "alias", "as_strided", "unbind", "split",
    "split_with_sizes", "lift_fresh", "empty", "empty_like", "new_empty", "unflatten", "flatten",
})  # fmt: skip
"""Operations that launch nothing."""

_PRODUCTS = frozenset({"mm", "addmm", "addmm_", "bmm", "baddbmm"})
_FILLS = frozenset({"zeros", "zeros_like", "new_zeros", "fill_", "zero_", "full", "full_like",
                    "ones", "ones_like", "arange"})  # fmt: skip


class Recorder(TorchDispatchMode):
    """Counts what runs on the card inside the block.

    Attributes:
        waits: what the host waits for the card for, by its place in the code.
        launches: how many kernels.
        live, peak: bytes on the card now, and at most.
        operations: of products and attention.
        seconds: by the kind of operation, by the roofline.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, int] = {}
        self.live = self.peak = 0
        self.reset()

    def reset(self) -> None:
        """Forget what was counted, and go on with the memory as it is."""
        self.waits: Counter[str] = Counter()
        self.launches = 0
        self.operations = 0.0
        self.seconds: Counter[str] = Counter()
        self.peak = self.live

    def track(self, tensor: torch.Tensor) -> None:
        """Count the storage of `tensor` for as long as it lives, once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if tensor.device.type != "cuda" or key in self._known:
            return
        self._known[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._let_go, key)

    def _let_go(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and count it."""
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        taken = [part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        on_card = [part for part in taken if part.device.type == "cuda"]
        if on_card and name in ("_local_scalar_dense", "nonzero", "masked_select", "unique2"):
            self.waits[f"{name} {_place()}"] += 1
        if name == "_local_scalar_dense" and isinstance(taken[0], FakeTensor):
            return {torch.bool: True}.get(taken[0].dtype, 1)  # a number that nobody has
        made = func(*args, **kwargs)
        outputs = [part for part in tree_leaves(made) if isinstance(part, torch.Tensor)]
        if not outputs and name.endswith("_"):  # of several tensors, in place
            outputs = [part for part in tree_leaves(args[0]) if isinstance(part, torch.Tensor)]
        if name in ("_to_copy", "copy_"):
            self._note_copy(name, args, kwargs, outputs)
        for part in outputs:
            self.track(part)
        if any(part.device.type == "cuda" for part in outputs) and name not in VIEWS:
            self.launches += 1
            adds = "add" in name and kwargs.get("beta", 1) != 0
            kind, seconds = self._time(name, args, on_card, outputs, adds)
            self.seconds[kind] += seconds
        return made

    def _note_copy(self, name: str, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> None:
        """Count a copy between host and card that the host waits for."""
        source, target = (args[1], args[0]) if name == "copy_" else (args[0], outputs[0])
        if source.device.type == target.device.type:
            return
        waits = not (args[2] if name == "copy_" and len(args) > 2 else kwargs.get("non_blocking"))
        if waits or target.device.type == "cpu":
            way = f"{source.device.type} to {target.device.type}"
            self.waits[f"copy {way} {_place()}"] += 1

    def _time(
        self, name: str, args: Any, taken: list[torch.Tensor], made: list[torch.Tensor], adds: bool
    ) -> tuple[str, float]:
        """Return the kind of an operation, and the seconds that it takes by the roofline.

        Args:
            name: of it.
            args: what it was called with.
            taken: the tensors among them.
            made: what it wrote.
            adds: whether a product is added to what was there, which is read, too.
        """
        if name in _PRODUCTS:
            one, other = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            count = 2.0 * one.shape[-2] * one.shape[-1] * other.shape[-1]
            count *= one.shape[0] if one.dim() == 3 else 1
            self.operations += count
            moved = _size(one) + _size(other) + _size(made[0]) * (1 + adds)
            narrow = min(one.shape[-2], one.shape[-1], other.shape[-1]) <= 64
            kind = "narrow products" if narrow else "products"
            return kind, max(count / PRODUCTS, moved / BYTES)
        if "varlen" in name or "flash" in name or "attention" in name:
            count = _attention(args, backward="backward" in name)
            self.operations += count
            return "attention", count / ATTENTION
        moved = sum(map(_size, made))
        if name not in _FILLS:
            moved += sum(map(_size, taken))
        return "rest", moved / BYTES


def _attention(args: Any, *, backward: bool) -> float:
    """Return the operations of a causal attention over equal sequences, as the runs here have."""
    states = [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 3]
    ends = [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 1 and len(a) > 1]
    tokens, heads, width = states[-3].shape if not backward else states[1].shape
    sequences = len(ends[0]) - 1 if ends else 1
    # Two products over half of the square, and five in the backward pass.
    return (5 if backward else 2) * 2.0 * tokens * (tokens / sequences) / 2 * heads * width


def _size(tensor: torch.Tensor) -> float:
    """Return the bytes that are read or written; of what is broadcast, once."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride or length == 1 else 1
    return float(count * tensor.element_size())


def _place() -> str:
    """Return the innermost line of ours that led here, and of a library where there is none."""
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
