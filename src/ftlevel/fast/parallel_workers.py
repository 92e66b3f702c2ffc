"""Passes of a step side by side on a CPU, each by its share of the threads.

A pass through the model is thousands of small operations between its large products. Given all
threads, every operation ends with all of them waiting for one another, and what is not split leaves
all but one idle. A thread with a pass of its own has neither. The gradients are added in the order
of the passes, whichever is done first, so the same rows give the same bits.

What is computed side by side must not write to the model. What it drops at random it draws from a
generator of the pass (`speed.dropout`): torch's own belongs to the process, and who draws first
would be chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import torch

from ftlevel.fast.layers.dropout import drawing_from
from ftlevel.fast.packing.layout import Layout, laid_out
from ftlevel.fast.prefixes.shared_prefix import Trunk, along

Gradients = tuple[torch.Tensor | None, ...]

MOST_LANES = 4
"""Lanes at most: each holds the activations of its pass, and Python runs one of them at a time."""

GAIN = 1.1
"""What lanes compute in the time in which one pass with all threads computes 1: 1.03 to 1.16 on two
quiet Zen 4 cores, 1.3 to 1.5 where other work takes part of them (docs/performance.md)."""


class Lanes:
    """Threads that compute passes.

    Attributes:
        count: how many passes are computed at once.
        draws: whether they drop something at random, and need a seed.

    Args:
        count: as the attribute.
        threads: torch's threads, which the lanes share out.
        draws: as the attribute.
    """

    def __init__(self, count: int, threads: int, draws: bool = False) -> None:
        self.count = count
        self.draws = draws
        self._threads = threads
        share = max(1, threads // count)
        self._pool = ThreadPoolExecutor(count, "ftlevel-lane", torch.set_num_threads, (share,))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
        torch.set_num_threads(self._threads)  # the last number that was set is that of new threads

    def backward(
        self,
        compute: Callable[[Any], torch.Tensor],
        passes: Sequence[tuple[Layout | None, Any]],
        parameters: Sequence[torch.Tensor],
        seed: int | None = None,
        trunk: Trunk | None = None,
    ) -> list[torch.Tensor]:
        """Add the gradients of all passes to `parameters` (mutated), in the order of the passes.

        Those through a trunk come last.

        Args:
            compute: the batch of a pass → its loss (a scalar); called in the threads.
            passes: layout and batch of each.
            parameters: what is trained.
            seed: of what the passes draw at random; None where they draw nothing.
            trunk: what all passes begin with, computed; its graph is gone afterwards.

        Returns:
            The losses, without their graphs. What `compute` raises is raised here.
        """
        leaves = trunk.leaves if trunk is not None else []
        wanted = [*parameters, *leaves]

        def run(number: int, part: tuple[Layout | None, Any]) -> tuple[torch.Tensor, Gradients]:
            layout, batch = part
            own_seed = None if seed is None else seed + number
            with laid_out(layout, own_thread=True), drawing_from(own_seed), along(trunk):
                loss = compute(batch)
                return loss.detach(), torch.autograd.grad(loss, wanted, allow_unused=True)

        losses = []
        for loss, gradients in self._pool.map(
            run, count(), passes
        ):  # cancels the others when one fails
            losses.append(loss)
            _add_all(wanted, gradients)
        if trunk is not None:
            _add_all(parameters, trunk.gradients([leaf.grad for leaf in leaves], parameters))
        return losses


def _add_all(parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            _add(parameter, gradient)


def _add(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    """Add as `backward` would, which gives a gradient the strides of its parameter.

    Fused optimizers go through both by one index: with other strides they would take the gradient
    of another element.
    """
    if parameter.grad is None:
        is_alike = gradient.stride() == parameter.stride()
        parameter.grad = gradient if is_alike else torch.empty_like(parameter).copy_(gradient)
    else:
        parameter.grad += gradient


def makespan(costs: Sequence[int], lanes: int) -> int:
    """Return when the last of `costs` is done, if each is begun in order by a lane that is free."""
    busy = [0] * lanes
    for cost in costs:
        first = busy.index(min(busy))
        busy[first] += cost
    return max(busy)


def duration(costs: Sequence[int], lanes: int) -> float:
    """Return in what time passes of `costs` are done, in tokens that all threads compute in it.

    Args:
        costs: tokens that each pass computes.
        lanes: how many passes are side by side; 1 for all threads on one.
    """
    return sum(costs) if lanes == 1 else makespan(costs, lanes) * lanes / GAIN
