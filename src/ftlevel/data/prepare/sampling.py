"""Orders in which rows are taken that depend on the seed and the epoch alone.

Trainer's own grouping draws from a generator whose state is not in a checkpoint, so a run that is
resumed inside an epoch goes on with other rows, in silence. Here an epoch's order is a function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.utils.data import Dataset, Sampler

from ftlevel.data.encoding.encode import Encoded

POOL = 50
"""Steps whose rows are sorted together: the rest of the order stays random."""


class LengthGroups(Sampler[int]):
    """Rows of like length in one optimizer step, the steps in random order.

    Args:
        lengths: of each row, in tokens.
        step: rows of an optimizer step.
        seed: of the order.

    Attributes:
        epoch: from 0; set it before the epoch's first row is taken.
    """

    def __init__(self, lengths: Sequence[int], step: int, seed: int) -> None:
        self.epoch = 0
        self._lengths = lengths
        self._step = step
        self._seed = seed

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield every row once; only the last step of the epoch may be short."""
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        rows = torch.randperm(len(self), generator=generator).tolist()
        steps: list[list[int]] = []
        for begin in range(0, len(rows), POOL * self._step):
            pool = sorted(rows[begin : begin + POOL * self._step], key=self._lengths.__getitem__)
            steps += [pool[i : i + self._step] for i in range(0, len(pool), self._step)]
        whole = [step for step in steps if len(step) == self._step]
        rest = [step for step in steps if len(step) < self._step]
        for index in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[index]
        for step in rest:
            yield from step


class ShareOfSteps(Sampler[list[int]]):
    """The batches of one of several processes that make each optimizer step together.

    Batch n of the order goes to process n mod count. All have as many, so that none waits for
    another in vain: where an epoch ends in the middle of a step, a batch is the one row NOTHING,
    the index after the last. accelerate would take rows from the epoch's beginning a second time.

    Args:
        order: of the rows.
        batch: rows of a batch.
        count: of the processes.
        rank: of this one.
    """

    def __init__(self, order: Sampler[int], batch: int, count: int, rank: int) -> None:
        self._order, self._batch, self._count, self._rank = order, batch, count, rank

    def __len__(self) -> int:
        rows = len(self._order)  # type: ignore[arg-type]  # every order here has a length
        return math.ceil(rows / (self._batch * self._count))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of this process."""
        rows = list(self._order)
        for step in range(len(self)):
            begin = (step * self._count + self._rank) * self._batch
            yield rows[begin : begin + self._batch] or [len(rows)]


class RowsAndNothing(Dataset[Encoded]):
    """Rows, and after the last one NOTHING: the first row, marked as one that does not count."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows) + 1

    def __getitem__(self, index: int) -> Encoded:
        """Return a row."""
        if index < len(self._rows):
            return self._rows[index]
        return replace(self._rows[0], row=-1)
