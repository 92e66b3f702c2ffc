"""What the linears of a model are given: the second moment of each one's inputs, over rows.

The model is asked as often as memory makes it necessary: a moment is (in, in) in float32, and those
of a large model are larger than its weights. Linears that are given the same tensor share one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ftlevel.data.encoding.collate import Collator
from ftlevel.evaluation.scoring import batches
from ftlevel.evaluation.two_models.on_rows import Probe
from ftlevel.models.hardware import autocast

MOST_BYTES = 1 << 30
_BATCH = 4


@dataclass
class InputMoments:
    """H = E[x xᵀ] of the inputs of linears, made when it is asked for.

    Attributes:
        model: in eval mode.
        probe: the rows, and how the model is asked.
        dtype: compute precision's name.
        sizes: linear → how many inputs it has, in the order in which they will be asked for.
        passes: how often the model was asked.
    """

    model: Any
    probe: Probe
    dtype: str
    sizes: Mapping[str, int]
    passes: int = 0
    _held: dict[str, torch.Tensor | None] = field(default_factory=dict)

    def of(self, name: str) -> torch.Tensor | None:
        """Return H of the linear `name`, (in, in) in float32 on the CPU; None if none used it."""
        if name not in self._held:
            self._held = {}
            self._held = self._ask(self._group(name))
            self.passes += 1
        return self._held[name]

    def _group(self, first: str) -> list[str]:
        """Return `first` and what follows it, as many as memory is for."""
        names, size = list(self.sizes), 0
        group: list[str] = []
        for name in names[names.index(first) :]:
            size += 4 * self.sizes[name] ** 2
            if group and size > MOST_BYTES:
                break
            group.append(name)
        return group

    def _ask(self, names: list[str]) -> dict[str, torch.Tensor | None]:
        sums = _Sums()
        hooks = [self.model.get_submodule(n).register_forward_pre_hook(sums.hook(n)) for n in names]
        collate, device = Collator(self.probe.pad_id), self.probe.device
        try:
            with torch.no_grad(), autocast(device, self.dtype):
                for rows in batches(self.probe.rows, _BATCH):
                    batch = {name: value.to(device) for name, value in collate(rows).items()}
                    sums.mask = batch["attention_mask"].bool()
                    self.model(**self.probe.objective.split(batch)[0])
        finally:
            for hook in hooks:
                hook.remove()
        sums.finish()
        return {name: sums.means.get(sums.slots.get(name, "")) for name in names}


@dataclass
class _Sums:
    """Σ x xᵀ by the linear that was given x first.

    Attributes:
        slots: linear → the one that it shares its inputs with, or itself.
        means: of the latter, the sums and at the end the means.
        mask: (batch, seq), the positions that are no padding.
    """

    slots: dict[str, str] = field(default_factory=dict)
    means: dict[str, torch.Tensor] = field(default_factory=dict)
    mask: torch.Tensor | None = None
    _last: tuple[Any, str] = (None, "")
    _counts: dict[str, int] = field(default_factory=dict)

    def hook(self, name: str) -> Any:
        """Return what sees the inputs of the linear `name`."""

        def see(_: Any, inputs: tuple[Any, ...]) -> None:
            given, slot = self._last
            if inputs[0] is given:
                self.slots[name] = slot
                return
            self._last = (inputs[0], name)
            self.slots[name] = name
            self._add(name, inputs[0])

        return see

    def _add(self, name: str, given: torch.Tensor) -> None:
        mask = self.mask
        fits = mask is not None and given.shape[:2] == mask.shape
        rows = (given[mask] if fits else given.reshape(-1, given.shape[-1])).float()
        with torch.autocast(rows.device.type, enabled=False):  # which would round the sums
            total = (rows.T @ rows).cpu()
        self.means[name] = self.means[name].add_(total) if name in self.means else total
        self._counts[name] = self._counts.get(name, 0) + len(rows)

    def finish(self) -> None:
        """Make means of the sums."""
        for name, total in self.means.items():
            total /= max(self._counts[name], 1)
