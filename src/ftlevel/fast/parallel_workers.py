"""Micro-batches of a step in parallel on a CPU, each by a worker with its share of the threads.

A micro-batch is thousands of small operations between its large products. Given all threads, every
operation ends with all of them waiting for one another, and what is not split leaves all but one
idle. A worker with a micro-batch of its own has neither. The gradients are added in the order of
the micro-batches, whichever is done first, so the same rows give the same bits.

What is computed in parallel must not write to the model. What it drops at random it draws from the
worker's own generator (`layers.dropout`), seeded by micro-batch: torch's belongs to the process,
and who draws first would be chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import torch

from ftlevel.fast.layers.recompute import using_generator
from ftlevel.fast.packing import PackedLayout, using_layout
from ftlevel.fast.prefixes import SharedPrefix, using_prefix

Gradients = tuple[torch.Tensor | None, ...]

MAX_WORKERS = 4
"""Each holds the activations of its micro-batch, and Python runs one of them at a time."""

GAIN = 1.1
"""What workers compute in the time in which all threads on one micro-batch compute 1: 1.03 to 1.16
on two quiet Zen 4 cores, 1.3 to 1.5 where other work takes part of them (docs/performance.md)."""


class ParallelWorkers:
    """Threads that compute micro-batches.

    Attributes:
        count: how many micro-batches are computed at once.
        is_random: whether they drop something at random, and need a seed.

    Args:
        count: as the attribute.
        threads: torch's threads, which the workers share out.
        is_random: as the attribute.
    """

    def __init__(self, count: int, threads: int, is_random: bool = False) -> None:
        self.count = count
        self.is_random = is_random
        self._threads = threads
        share = max(1, threads // count)
        self._pool = ThreadPoolExecutor(count, "ftlevel-worker", torch.set_num_threads, (share,))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
        torch.set_num_threads(self._threads)  # the last number that was set is that of new threads

    def backward(
        self,
        compute: Callable[[Any], torch.Tensor],
        micro_batches: Sequence[tuple[PackedLayout | None, Any]],
        parameters: Sequence[torch.Tensor],
        seed: int | None = None,
        shared_prefix: SharedPrefix | None = None,
    ) -> list[torch.Tensor]:
        """Add the gradients of all micro-batches to `parameters` (mutated), in their order.

        Those through a shared prefix come last.

        Args:
            compute: the batch of a micro-batch → its loss (a scalar); called in the threads.
            micro_batches: layout and batch of each.
            parameters: what is trained.
            seed: of what the micro-batches draw at random; None where they draw nothing.
            shared_prefix: what all of them begin with, computed; its graph is gone afterwards.

        Returns:
            The losses, without their graphs. What `compute` raises is raised here.
        """
        leaves = shared_prefix.leaves if shared_prefix is not None else []
        wanted = [*parameters, *leaves]

        def run(
            number: int, part: tuple[PackedLayout | None, Any]
        ) -> tuple[torch.Tensor, Gradients]:
            layout, batch = part
            own_seed = None if seed is None else seed + number
            with (
                using_layout(layout, own_thread=True),
                using_generator(own_seed),
                using_prefix(shared_prefix),
            ):
                loss = compute(batch)
                return loss.detach(), torch.autograd.grad(loss, wanted, allow_unused=True)

        losses = []
        for loss, gradients in self._pool.map(
            run, count(), micro_batches
        ):  # cancels the others when one fails
            losses.append(loss)
            _add_all(wanted, gradients)
        if shared_prefix is not None:
            _add_all(
                parameters, shared_prefix.gradients([leaf.grad for leaf in leaves], parameters)
            )
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


def makespan(costs: Sequence[int], workers: int) -> int:
    """Return when the last of `costs` is done, if a free worker begins each in order."""
    busy = [0] * workers
    for cost in costs:
        first = busy.index(min(busy))
        busy[first] += cost
    return max(busy)


def duration(costs: Sequence[int], workers: int) -> float:
    """Return in what time `costs` are done, in tokens that all threads compute in it.

    Args:
        costs: tokens that each micro-batch computes.
        workers: how many micro-batches are in parallel; 1 for all threads on one.
    """
    return sum(costs) if workers == 1 else makespan(costs, workers) * workers / GAIN
