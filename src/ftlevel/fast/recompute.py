"""Recomputation of saved activations, and dropout with a generator per worker.

LoRA layers save their input, the output of a norm or GLU, only for the gradient of A. With a
`Recomputation` they compute it again from the tensors that the norm or GLU saves anyway.

torch's dropout uses the global generator, so parallel workers would not be reproducible. Here each
micro-batch has a seed. Dropout draws 16 random bits per element, torch's 64 (docs/performance.md).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ftlevel.models.upstream.tensors import version_of


class _ThreadLocal(threading.local):
    generator: torch.Generator | None = None


_thread_local = _ThreadLocal()


def worker_generator() -> torch.Generator | None:
    """Returns the generator set by `using_generator` in this thread, or None."""
    return _thread_local.generator


@contextlib.contextmanager
def using_generator(seed: int | None) -> Iterator[None]:
    """In the `with` block, this thread draws dropout with `seed`; None: with torch's generator."""
    before = _thread_local.generator
    _thread_local.generator = None if seed is None else torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        _thread_local.generator = before


_LEVELS = 1 << 16


def dropout_mask(like: Tensor, p: float) -> Tensor:
    """Returns a CPU tensor like `like`: 0 with probability `p` (± 1/65,536), else 1 / (1 - p)."""
    count, dropped = like.numel(), min(round(p * _LEVELS), _LEVELS - 1)
    bits = torch.empty(-(-count // 4), dtype=torch.int64)
    bits.random_(-(1 << 63), None, generator=worker_generator())
    values = bits.view(torch.int16)[:count].view(like.shape)
    mask = torch.empty(like.shape, dtype=like.dtype)
    torch.ge(values, dropped - _LEVELS // 2, out=mask)
    return mask.div_(1 - dropped / _LEVELS)


class GeneratorDropout(nn.Dropout):
    """`nn.Dropout` with `dropout_mask` on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns `input` (any shape) with random elements zeroed and the rest divided by 1 - p."""
        if not self.training or self.p == 0.0 or input.device.type != "cpu":
            return super().forward(input)
        return input * dropout_mask(input, self.p)


class ReplacedModules:
    """Replaces each module of `model` by `replace(module)`, unless None, until `remove`."""

    def __init__(self, model: nn.Module, replace: Callable[[nn.Module], nn.Module | None]) -> None:
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if (replacement := replace(child)) is not None:
                    setattr(parent, name, replacement.train(child.training))
                    self._replaced.append((parent, name, child))

    def remove(self) -> None:
        """Restore the modules, in the training mode of their replacements."""
        for parent, name, child in self._replaced:
            setattr(parent, name, child.train(getattr(parent, name).training))


class PerWorkerDropout(ReplacedModules):
    """Until `remove`, each `nn.Dropout` of `model` draws CPU masks from its thread's generator."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, _as_generator_dropout)


def _as_generator_dropout(module: nn.Module) -> GeneratorDropout | None:
    is_exact = type(module) is nn.Dropout  # subclasses may differ
    if is_exact and isinstance(module, nn.Dropout) and module.p > 0 and not module.inplace:
        return GeneratorDropout(module.p)
    return None


_NAME = "_ftlevel_recomputation"


class Recomputation:
    """How to recompute a tensor, shared by the autograd functions that need it in backward.

    `make` computes the tensor bit for bit from other tensors. The autograd functions save these
    other tensors, so that checkpointing and offloading apply to them.
    """

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self._make = make
        self._num_users = 0
        self._cached: Tensor | None = None

    def register(self) -> None:
        """Count one more autograd function that will call `make` in its backward."""
        self._num_users += 1

    def make(self, *saved: Tensor) -> Tensor:
        """Compute the tensor from `saved`; cached until every registered function has it."""
        self._num_users -= 1
        tensor = self._make(*saved) if self._cached is None else self._cached
        self._cached = tensor if self._num_users > 0 else None
        return tensor


def with_recomputation(tensor: Tensor, make: Callable[..., Tensor], *saved: Tensor) -> Tensor:
    """Mark `tensor`, so that layers save `saved` and recompute it by `make(*saved)`; returns it."""
    parts = tuple(part.detach() for part in saved)
    setattr(tensor, _NAME, (Recomputation(make), parts, version_of(tensor)))
    return tensor


def recomputation_of(tensor: Tensor) -> tuple[Recomputation, tuple[Tensor, ...]] | None:
    """Returns the `Recomputation` of `tensor` and its saved tensors; None if it must be saved.

    Views, copies, and tensors of inference mode or changed in place must be saved.
    """
    if tensor.is_inference():
        return None
    entry: tuple[Recomputation, tuple[Tensor, ...], int] | None
    entry = getattr(tensor, _NAME, None)
    return entry[:2] if entry is not None and entry[2] == version_of(tensor) else None
