"""A stream as the rows of a run, by their number in it, with its state in every checkpoint.

The Trainer asks for rows 0, 1, … in order, and after a resumption for those from the first on that
was not trained on. So it needs to know nothing of streams: skipping is its own arithmetic on row
numbers, and no row is read for it.
"""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler

from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.store import RowStore, rows_to_batches, write_store
from ftlevel.data.prepare.row_stream import RowStream, StreamState
from ftlevel.errors import ConfigError

_STATE, _ROWS = "stream.json", "stream.arrow"
_KEPT = 8  # states of the last optimizer steps: the loader is a batch or two ahead of them


class StreamedRows:
    """The rows of a run, in the order in which they are taken.

    Args:
        stream: gives them.
        step: rows of an optimizer step, over all processes.
        steps: optimizer steps of the run.
        together: rows that all processes take from it at once, of which each is given its own.
    """

    def __init__(self, stream: RowStream, step: int, steps: int, together: int = 1) -> None:
        self._stream, self._step, self._steps = stream, step, steps
        self._together, self._taken = together, deque[Encoded](maxlen=together)
        self._next = 0
        self._states: OrderedDict[int, StreamState] = OrderedDict()

    def __len__(self) -> int:
        return self._step * self._steps

    def __getitem__(self, index: int) -> Encoded:
        """Return row `index`, going over those before it that another process takes.

        Raises:
            IndexError: the stream is past it.
        """
        if index < self._next - self._together:
            raise IndexError(f"row {index:,} of a stream was taken; the next is {self._next:,}")
        while index >= self._next:
            for _ in range(self._together):
                self._take()
        return self._taken[index - self._next]

    def _take(self) -> None:
        """Take the next row from the stream; all processes take it after the same step."""
        if self._next % self._step == 0:
            self._states[self._next // self._step] = self._stream.state()
            while len(self._states) > _KEPT:
                self._states.popitem(last=False)
        self._taken.append(next(self._stream))
        self._next += 1

    @property
    def counts(self) -> dict[str, int]:
        """What became of the rows that were read."""
        return self._stream.counts

    def save(self, folder: Path, step: int) -> None:
        """Write to `folder` where the stream is after optimizer step `step`.

        The loader may have taken rows of the steps after it already.
        """
        at_the_end = self._next == step * self._step
        state = self._stream.state() if at_the_end else self._states[step]
        rows = [*state.waiting, *state.buffered]
        if rows:
            write_store(folder / _ROWS, rows_to_batches(rows))
        content = {
            "step": step,
            "passes": state.passes,
            "cursor": state.cursor,
            "skip": state.skip,
            "kept": state.kept,
            "waiting": len(state.waiting),
            "draws": state.draws,
            "counts": state.counts,
        }
        (folder / _STATE).write_text(json.dumps(content), encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Go on from what `save` wrote to `folder`.

        Raises:
            ConfigError: it is not there.
        """
        if not (folder / _STATE).is_file():
            raise ConfigError(
                f"--resume: {folder} has no {_STATE}, so it is not of a streamed run. Start it "
                "again with --overwrite."
            )
        content: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        rows: Sequence[Encoded] = []
        if (folder / _ROWS).is_file():
            rows = list(RowStore(folder / _ROWS))
        waiting = content["waiting"]
        self._stream.set_state(
            StreamState(
                content["passes"], content["cursor"], content["skip"], content["kept"],
                tuple(rows[:waiting]), tuple(rows[waiting:]), content["draws"], content["counts"],
            )
        )  # fmt: skip
        self._next = content["step"] * self._step


class InOrder(Sampler[int]):
    """The numbers of the rows from the first to the last."""

    def __init__(self, rows: StreamedRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        """Yield each once."""
        return iter(range(len(self._rows)))
