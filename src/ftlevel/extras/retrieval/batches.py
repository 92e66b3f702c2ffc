"""Order of the rows of embedding models, and micro-batches of their texts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ftlevel.data.encoding.row import Encoded
from ftlevel.data.prepare.samplers import EpochSampler, count_padded_rows
from ftlevel.extras.retrieval.rows import EncodedText, distinct_texts
from ftlevel.fast.step_collator import StepCollator

LOOKAHEAD = 10_000
"""Maximum number of rows with repeated texts to skip while filling a step."""


class DistinctTextSampler(EpochSampler):
    """Sampler in random order; no text occurs in two rows of an optimizer step.

    Rows that fit into no step are in the last steps; `repeated` counts them. Texts are not compared
    unless `is_distinct`.

    If `sets` has the dataset of each row, all rows of a step are from one dataset. Datasets are
    chosen at random, in proportion to their steps. Short steps end with padding rows, whose index
    is the number of rows.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        step: int,
        seed: int,
        sets: Sequence[int] = (),
        *,
        is_distinct: bool = True,
    ) -> None:
        self.repeated = 0
        self._step, self._seed, self._sets = step, seed, sets
        text_ids: dict[tuple[int, ...], int] = {}
        self._texts = [
            {text_ids.setdefault(tuple(text.input_ids), len(text_ids)) for text in row.sequences}
            if is_distinct
            else set()
            for row in rows
        ]

    def __len__(self) -> int:
        return count_padded_rows(self._sets, self._step) if self._sets else len(self._texts)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        order = torch.randperm(len(self._texts), generator=generator).tolist()
        self.repeated = 0
        if not self._sets:
            for step in self._split(order):
                yield from step
            return
        left: dict[int, list[int]] = {}
        for row in order:
            left.setdefault(self._sets[row], []).append(row)
        steps = {number: list(self._split(rows)) for number, rows in sorted(left.items())}
        turns = [number for number, own in steps.items() for _ in own]
        for at in torch.randperm(len(turns), generator=generator).tolist():
            step = steps[turns[at]].pop(0)
            yield from step
            yield from [len(self._texts)] * (self._step - len(step))

    def _split(self, order: list[int]) -> Iterator[list[int]]:
        """Yields the rows of each step, chosen in order from the rows `order`."""
        left, limit = deque(order), max(LOOKAHEAD, self._step)
        while left:
            used: set[int] = set()
            chosen: list[int] = []
            later: list[int] = []
            while left and len(chosen) < self._step and len(later) < limit:
                row = left.popleft()
                if used.isdisjoint(self._texts[row]):
                    used |= self._texts[row]
                    chosen.append(row)
                else:
                    later.append(row)
            if len(chosen) < self._step:  # only rows with repeated texts are left or near
                more = later[: self._step - len(chosen)]
                later = later[len(more) :]
                self.repeated += len(more)
                chosen += more
            yield chosen
            left.extendleft(reversed(later))


class TextCollator(StepCollator):
    """Collates rows of texts to embed; each distinct text of a step is collated once."""

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """Returns `StepCollator`'s dict for the distinct texts of `rows`, with key `texts`."""
        texts, step = distinct_texts(rows)
        return {**super().__call__(texts), "rows": rows, "texts": step}

    def _micro_batch(
        self, rows: Sequence[Encoded], indices: Sequence[int], partition: Any
    ) -> dict[str, Any]:
        unpooled = [row.unpooled for i in indices if isinstance(row := rows[i], EncodedText)]
        return {**super()._micro_batch(rows, indices, partition), "unpooled": unpooled}
