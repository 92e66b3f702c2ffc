"""How far a gradient is from another one, by tensor and by kind of tensor."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

Gradients = Mapping[str, torch.Tensor]

_COMPARED_AT_ONCE = 2**20
"""Elements whose differences are held in float64: an embedding's would take more than the model."""


@dataclass(frozen=True)
class Apart:
    """Sums over the elements of a gradient g and of its reference r; two of them can be added.

    Attributes:
        difference: Σ (g − r)².
        reference: Σ r².
        along: Σ g · r.
    """

    difference: float = 0.0
    reference: float = 0.0
    along: float = 0.0

    def __add__(self, other: Apart) -> Apart:
        """Return the sums over both."""
        return Apart(
            self.difference + other.difference,
            self.reference + other.reference,
            self.along + other.along,
        )

    @property
    def distance(self) -> float:
        """‖g − r‖ / ‖r‖: direction and length in one. 0 where both are 0, infinite where r is."""
        if self.reference == 0:
            return 0.0 if self.difference == 0 else float("inf")
        return float((self.difference / self.reference) ** 0.5)

    @property
    def length(self) -> float:
        """By how much g is too long along r: ⟨g, r⟩ / ⟨r, r⟩ − 1. Rounding averages out in it."""
        return self.along / self.reference - 1 if self.reference else 0.0


def compare_gradients(gradients: Gradients, reference: Gradients) -> dict[str, Apart]:
    """Return how far each tensor's gradient is from its reference; a missing one counts as zero."""
    found = {}
    for name in gradients.keys() | reference.keys():
        like = reference.get(name, gradients.get(name))
        if like is None:
            raise KeyError(name)
        zeros = torch.zeros((), dtype=like.dtype).expand_as(like)
        pair = [of.get(name, zeros).cpu().flatten() for of in (gradients, reference)]
        parts = zip(*(torch.split(tensor, _COMPARED_AT_ONCE) for tensor in pair), strict=True)
        found[name] = total(_compare(*part) for part in parts)
    return found


def _compare(gradient: torch.Tensor, reference: torch.Tensor) -> Apart:
    """Return the sums over two tensors on the CPU, in float64, which MPS has not."""
    g, r = gradient.double(), reference.double()
    return Apart(float((g - r).square().sum()), float(r.square().sum()), float((g * r).sum()))


def total(parts: Iterable[Apart]) -> Apart:
    """Return the sums over all of `parts`."""
    return sum(parts, Apart())


def kind_of(name: str) -> str:
    """Return what the tensors of all layers that `name` is one of have in common.

    `base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight` is a `lora_A`.
    """
    parts = [part for part in name.split(".") if not part.isdigit()]
    if parts[-1] in ("weight", "bias") and len(parts) > 1 and "default" in parts[-2]:
        parts = parts[:-2] + ([parts[-1]] if parts[-1] == "bias" else [])
    if parts[-1] == "default":
        parts = parts[:-1]
    if parts[-1] in ("weight", "bias") and len(parts) > 1:
        return f"{re.sub(r'_?[0-9]+$', '', parts[-2])}.{parts[-1]}"
    return parts[-1]


def by_kind(tensors: Mapping[str, Apart]) -> dict[str, Apart]:
    """Return the sums over the tensors of each kind."""
    kinds: dict[str, Apart] = defaultdict(Apart)
    for name, apart in tensors.items():
        kinds[kind_of(name)] += apart
    return dict(kinds)


def added(sums: Mapping[str, Apart], more: Mapping[str, Apart]) -> dict[str, Apart]:
    """Return the sums over both, by name."""
    return {name: sums.get(name, Apart()) + more.get(name, Apart()) for name in {**sums, **more}}
