"""Rows with what a teacher expects of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.sources.computed import Computed

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class TaughtRow(Encoded):
    """A row with what a teacher expects.

    Attributes:
        taught: an array of `outcome_dtype`, one for each target that is predicted.
    """

    taught: Any = field(default=None, compare=False, metadata={"column": "json"})

    @property
    def branches(self) -> Sequence[Encoded]:
        """The row itself; what the teacher expects is of the batch."""
        return [Encoded(self.input_ids, self.labels, self.row, self.extras)]

    @property
    def teacher(self) -> np.ndarray | None:
        """What the teacher expects."""
        return self.taught


class TaughtRows(Computed[Encoded]):
    """Rows with what a teacher expects of them.

    Args:
        rows: of text.
        kept: (targets,) of `outcome_dtype`, row after row.
        begins: of each row, where its own begin; and behind the last, where they end.
    """

    def __init__(self, rows: Sequence[Encoded], kept: np.ndarray, begins: Sequence[int]) -> None:
        self.rows, self._kept, self._begins = rows, kept, begins

    def __len__(self) -> int:
        return len(self.rows)

    def _item(self, at: int) -> Encoded:
        row, own = self.rows[at], slice(self._begins[at], self._begins[at + 1])
        return TaughtRow(row.input_ids, row.labels, row.row, row.extras, self._kept[own])
