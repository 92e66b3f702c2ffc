"""Samplers, which order rows by seed and epoch, and division of a step among processes.

The length grouping of `Trainer` uses a generator that checkpoints do not store, so a run resumed
within an epoch would continue with other rows; the orders here depend only on the seed and the
epoch.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.utils.data import Dataset, Sampler

from ftlevel.data.encoding.row import Encoded

POOL = 50
"""Number of steps whose rows are sorted together."""


class EpochSampler(Sampler[int]):
    """Base class of samplers with an order per epoch; set `epoch` (from 0) before its first row."""

    epoch: int = 0


class LengthGroupedSampler(EpochSampler):
    """Sampler that groups rows of similar length into optimizer steps, in random order.

    `lengths` are in tokens; `step` is the number of rows per step.
    """

    def __init__(self, lengths: Sequence[int], step: int, seed: int) -> None:
        self._lengths = lengths
        self._step = step
        self._seed = seed

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        rows = torch.randperm(len(self), generator=generator).tolist()
        steps: list[list[int]] = []
        for start in range(0, len(rows), POOL * self._step):
            pool = sorted(rows[start : start + POOL * self._step], key=self._lengths.__getitem__)
            steps += [pool[i : i + self._step] for i in range(0, len(pool), self._step)]
        whole = [step for step in steps if len(step) == self._step]
        rest = [step for step in steps if len(step) < self._step]
        for index in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[index]
        for step in rest:
            yield from step


def count_padded_rows(sets: Sequence[int], step: int) -> int:
    """Returns the rows per epoch, padded to full steps per dataset; `sets`: dataset of each row."""
    return sum(math.ceil(size / step) * step for size in Counter(sets).values())


class StepShardSampler(Sampler[list[int]]):
    """Batch sampler of one process, if several processes share each optimizer step.

    A step has `batch * num_processes` consecutive rows of `order`. With `lengths`, the tokens of
    each row, a step's rows are divided so that all processes have about equally many tokens: the
    longest row goes first, to the process with the fewest tokens. Without them, each process has
    `batch` consecutive rows.

    All processes have equally many batches: if a step has no row for a process, its batch is one
    padding row, whose index is the number of rows; accelerate would repeat rows from the beginning
    of the epoch.
    """

    def __init__(
        self,
        order: Sampler[int],
        batch: int,
        num_processes: int,
        rank: int,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self._order, self._batch, self._count, self._rank = order, batch, num_processes, rank
        self._lengths = lengths

    def __len__(self) -> int:
        rows = len(self._order)  # type: ignore[arg-type]  # all samplers used here have a length
        return math.ceil(rows / (self._batch * self._count))

    def __iter__(self) -> Iterator[list[int]]:
        rows, step_size = list(self._order), self._batch * self._count
        for start in range(0, len(rows), step_size):
            step = rows[start : start + step_size]
            if self._lengths is None:
                begin = self._rank * self._batch
                share = step[begin : begin + self._batch]
            else:  # an order may have padding rows, too
                step = [row for row in step if row < len(self._lengths)]
                lengths = [int(self._lengths[row]) for row in step]
                share = [step[at] for at in divide_evenly(lengths, self._count)[self._rank]]
            yield share or [len(rows)]


def divide_evenly(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Divide items into `count` parts of about equal size; returns the sorted indices of each.

    Items are assigned from the largest to the smallest, each to the part that is smallest so far.
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    smallest = [(0, 0, number) for number in range(count)]  # a heap: size, items, part
    for at in sorted(range(len(sizes)), key=lambda at: -sizes[at]):
        size, items, number = smallest[0]
        parts[number].append(at)
        heapq.heapreplace(smallest, (size + sizes[at], items + 1, number))
    return [sorted(part) for part in parts]


class RowsWithPadding(Dataset[Encoded]):
    """`rows` and, last, a padding row: a copy of the first row that adds nothing to the loss."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows) + 1

    def __getitem__(self, index: int) -> Encoded:
        if index < len(self.rows):
            return self.rows[index]
        return replace(self.rows[0], row=-1)
