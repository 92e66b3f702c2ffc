"""Orders in which rows are taken that depend on the seed and the epoch alone.

Trainer's own grouping draws from a generator whose state is not in a checkpoint, so a run that is
resumed inside an epoch goes on with other rows, in silence. Here an epoch's order is a function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

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
