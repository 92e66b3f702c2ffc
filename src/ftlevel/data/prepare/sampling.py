"""Row orders that depend only on the seed and the epoch.

The length grouping of `Trainer` uses a generator that checkpoints do not store, so a run resumed
within an epoch would continue with other rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.utils.data import Dataset, Sampler

from ftlevel.data.encoding.encode import Encoded

POOL = 50
"""Number of steps whose rows are sorted together."""


class LengthGroupedSampler(Sampler[int]):
    """Group rows of similar length into optimizer steps, in random order.

    `lengths` are in tokens; `step` is the number of rows per step. Set `epoch` (from 0) before the
    first row of an epoch is read.
    """

    def __init__(self, lengths: Sequence[int], step: int, seed: int) -> None:
        self.epoch = 0
        self._lengths = lengths
        self._step = step
        self._seed = seed

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield every row index once; only the last step of the epoch may be short."""
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


class DistinctTextSampler(Sampler[int]):
    """Order rows at random so that no text occurs in two rows of an optimizer step.

    Rows of one step are consecutive. Rows that share a text with all steps left are in the last
    steps, `repeated` of them. Set `epoch` (from 0) before the first row of an epoch is read.
    """

    def __init__(self, rows: Sequence[Encoded], step: int, seed: int) -> None:
        self.epoch = 0
        self.repeated = 0
        self._step, self._seed = step, seed
        known: dict[tuple[int, ...], int] = {}
        self._texts = [
            {known.setdefault(tuple(text.input_ids), len(known)) for text in row.branches}
            for row in rows
        ]

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[int]:
        """Yield every row index once."""
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        left = torch.randperm(len(self), generator=generator).tolist()
        self.repeated = 0
        while left:
            taken: set[int] = set()
            chosen: list[int] = []
            later: list[int] = []
            for at, row in enumerate(left):
                if len(chosen) == self._step:
                    later += left[at:]
                    break
                if taken.isdisjoint(self._texts[row]):
                    taken |= self._texts[row]
                    chosen.append(row)
                else:
                    later.append(row)
            if len(chosen) < self._step:  # only rows with repeated texts are left
                more = later[: self._step - len(chosen)]
                later = later[len(more) :]
                self.repeated += len(more)
                chosen += more
            yield from chosen
            left = later


class StepShardSampler(Sampler[list[int]]):
    """Batches of one process when several processes share each optimizer step.

    Batch n of the order goes to process n mod count. All processes have equally many batches. At
    the end of an epoch a missing batch is a single NOTHING row, the index after the last row;
    accelerate would repeat rows from the beginning of the epoch.
    """

    def __init__(self, order: Sampler[int], batch: int, count: int, rank: int) -> None:
        self._order, self._batch, self._count, self._rank = order, batch, count, rank

    def __len__(self) -> int:
        rows = len(self._order)  # type: ignore[arg-type]  # all samplers used here have a length
        return math.ceil(rows / (self._batch * self._count))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of this process."""
        rows = list(self._order)
        for step in range(len(self)):
            start = (step * self._count + self._rank) * self._batch
            yield rows[start : start + self._batch] or [len(rows)]


class RowsWithPadding(Dataset[Encoded]):
    """Rows, followed by NOTHING: a copy of the first row that does not contribute to the loss."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows) + 1

    def __getitem__(self, index: int) -> Encoded:
        """Return a row."""
        if index < len(self._rows):
            return self._rows[index]
        return replace(self._rows[0], row=-1)
