"""Compute the micro-batches of a step in parallel on a CPU, one worker thread each.

A micro-batch has thousands of small operations, at which all threads would wait for each other.
Gradients are added in the order of the micro-batches, so results are deterministic. A forward pass
must not write to the model, and must draw from the worker's generator (`fast.recompute`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ftlevel.fast.packing import PackedLayout, using_layout
from ftlevel.fast.prefixes import SharedPrefix, using_prefix
from ftlevel.fast.recompute import using_generator

Gradients = tuple[Tensor | None, ...]

MAX_WORKERS = 4
"""Maximum workers; each needs memory for its activations, and the GIL serializes Python."""

GAIN = 1.1
"""Throughput relative to all threads on one micro-batch: 1.03 to 1.16 on two idle Zen 4 cores,
1.3 to 1.5 on busy ones.
"""


class ParallelWorkers:
    """Worker threads that compute one micro-batch each and share `threads` CPU threads of torch.

    `is_random` means that the micro-batches draw random values and need a seed.
    """

    def __init__(self, num_workers: int, threads: int, is_random: bool = False) -> None:
        self.count = num_workers
        self.is_random = is_random
        self._threads = threads
        threads_per_worker = max(1, threads // num_workers)
        self._pool = ThreadPoolExecutor(
            num_workers, "ftlevel-worker", torch.set_num_threads, (threads_per_worker,)
        )

    def close(self) -> None:
        """Stop the worker threads."""
        self._pool.shutdown()
        torch.set_num_threads(self._threads)  # new threads inherit the last number set

    def forward(
        self, compute: Callable[[int], Tensor], number: int, seed: int | None = None
    ) -> list[Tensor]:
        """Returns [compute(0), …, compute(number - 1)]; dropout in call i has seed `seed` + i."""

        def run(at: int) -> Tensor:
            with using_generator(None if seed is None else seed + at):
                return compute(at)

        return list(self._pool.map(run, range(number)))

    def backward(
        self,
        compute: Callable[[Any], Tensor],
        micro_batches: Sequence[tuple[PackedLayout | None, Any]],
        parameters: Sequence[Tensor],
        seed: int | None = None,
        shared_prefix: SharedPrefix | None = None,
    ) -> list[Tensor]:
        """Add the gradients of all micro-batches to `parameters` (modified); returns the losses.

        Gradients are added in order, those through `shared_prefix` last, whose graph is freed.
        `compute` maps a batch to its scalar loss and runs in the threads; its exceptions are raised
        here.
        """
        leaves = shared_prefix.leaves if shared_prefix is not None else []
        inputs = [*parameters, *leaves]

        def run(number: int, part: tuple[PackedLayout | None, Any]) -> tuple[Tensor, Gradients]:
            layout, batch = part
            worker_seed = None if seed is None else seed + number
            with (
                using_layout(layout, this_thread=True),
                using_generator(worker_seed),
                using_prefix(shared_prefix),
            ):
                loss = compute(batch)
                return loss.detach(), torch.autograd.grad(loss, inputs, allow_unused=True)

        losses = []
        for loss, gradients in self._pool.map(
            run, count(), micro_batches
        ):  # cancels the others when one fails
            losses.append(loss)
            _add_all(inputs, gradients)
        if shared_prefix is not None:
            _add_all(
                parameters, shared_prefix.gradients([leaf.grad for leaf in leaves], parameters)
            )
        return losses


def _add_all(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            _add(parameter, gradient)


def _add(parameter: Tensor, gradient: Tensor) -> None:
    """Add `gradient` to `parameter.grad` with the parameter's strides, as fused optimizers need."""
    if parameter.grad is None:
        has_same_strides = gradient.stride() == parameter.stride()
        parameter.grad = (
            gradient if has_same_strides else torch.empty_like(parameter).copy_(gradient)
        )
    else:
        parameter.grad += gradient


def makespan(durations: Sequence[int], workers: int) -> int:
    """Returns the total time if jobs of `durations` start in order, on the first idle worker."""
    end_times = [0] * workers
    for cost in durations:
        first = end_times.index(min(end_times))
        end_times[first] += cost
    return max(end_times)


def duration(costs: Sequence[int], workers: int) -> float:
    """Returns the time of micro-batches of `costs` tokens; unit: one token on all threads."""
    return sum(costs) if workers == 1 else makespan(costs, workers) * workers / GAIN
