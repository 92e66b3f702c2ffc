"""Write predicted rows to a file, pipe or list; read the rollouts.jsonl of a run.

rollouts.jsonl has one line per sampled prompt, with its completions and their rewards.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import IO, Any, ClassVar, Protocol

from ftlevel.artifacts.run_directory import read_objects
from ftlevel.errors import join_names

BANDS = 5
"""Number of length bands in `RolloutFacts.lengths`."""


@dataclass(frozen=True)
class ShownCompletion:
    """A completion for the report; `which` says why it is printed."""

    which: str
    step: int
    prompt: str
    text: str
    reward: float
    tokens: int
    ended: bool


@dataclass(frozen=True)
class RolloutFacts:
    """Best and worst completions of the first and the last step, and the reward by length.

    `lengths` has for each range of lengths in the last step: minimum and maximum tokens, number of
    completions, and mean reward.
    """

    shown: list[ShownCompletion]
    lengths: list[tuple[int, int, int, float]]


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of a rollouts.jsonl; empty if there is none."""
    return [record for record in read_objects(path) if isinstance(record.get("step"), int)]


def summarize_rollouts(path: Path) -> RolloutFacts | None:
    """Returns what a report shows of a rollouts.jsonl; None if it has no scored completions."""
    lines = read_rollouts(path)
    steps = sorted({line["step"] for line in lines})
    if not steps:
        return None
    ends = dict.fromkeys((steps[0], steps[-1]))
    of_steps = [
        _completions(lines, step, name)
        for step, name in zip(ends, ("first step", "last step"), strict=False)
    ]
    completions = [completion for of_step in of_steps for completion in _ends(of_step)]
    return RolloutFacts(completions, _by_length(of_steps[-1])) if completions else None


def _completions(lines: Sequence[Mapping[str, Any]], step: int, name: str) -> list[ShownCompletion]:
    """Returns the scored completions of a step, with `which` set to `name`."""
    return [
        ShownCompletion(
            name,
            step,
            _text_of(line["prompt"]),
            completion["text"],
            completion["reward"],
            completion["tokens"],
            completion["ended"],
        )
        for line in lines
        if line["step"] == step
        for completion in line["completions"]
        if completion["reward"] is not None
    ]


def _ends(completions: Sequence[ShownCompletion]) -> list[ShownCompletion]:
    """Returns the best and the worst completion, with "best" and "worst" added to `which`."""
    if not completions:
        return []
    ordered = sorted(completions, key=lambda completion: completion.reward)
    ends = (("best", ordered[-1]), ("worst", ordered[0]))
    return [replace(shown, which=f"{name}, {shown.which}") for name, shown in ends]


def _by_length(completions: Sequence[ShownCompletion]) -> list[tuple[int, int, int, float]]:
    ordered = sorted(completions, key=lambda completion: completion.tokens)
    if len({completion.tokens for completion in ordered}) < BANDS:
        return []
    bands = [
        ordered[len(ordered) * at // BANDS : len(ordered) * (at + 1) // BANDS]
        for at in range(BANDS)
    ]
    return [
        (band[0].tokens, band[-1].tokens, len(band), fmean(c.reward for c in band))
        for band in bands
    ]


def _text_of(prompt: Any) -> str:
    """Returns the prompt as text: the last message, if it is a list of messages."""
    if isinstance(prompt, list):
        return str(prompt[-1].get("content", "")) if prompt else ""
    return str(prompt)


def to_json(row: Mapping[str, Any]) -> str:
    """Returns a row as a line of JSON; NaN and infinity become null, other types text.

    The values of an array have nine digits, which determine a float32.
    """
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_as_text)
    except ValueError:
        return json.dumps(_finite(row), ensure_ascii=False, default=_as_text)


def to_cell(value: Any) -> str:
    """Returns a value as the cell of a table: empty for null, JSON for lists and objects."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | dict | tuple) or hasattr(value, "tolist"):
        return json.dumps(value, ensure_ascii=False, default=_as_text)
    return repr(value) if isinstance(value, int | float) else _as_text(value)


def _as_text(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return [float(f"{number:.9g}") for number in value.tolist()]
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowColumns:
    """Columns of a row file: `names` of the input; `answers`: predicted column → type (`Column`).

    `schema` is the Arrow schema of `names` if the source declares one.
    """

    names: Sequence[str]
    answers: Mapping[str, str] = field(default_factory=dict)
    schema: Any = None


class RowSink(Protocol):
    """Interface of a sink for rows; `is_table` is true if every row has the same columns."""

    is_table: ClassVar[bool]

    def write(self, rows: Sequence[Row]) -> None:
        """Write rows, each with its predicted columns."""

    def finish(self) -> None:
        """Complete the output."""

    def close(self) -> None:
        """Release resources."""


class LineStream:
    """Write rows as lines of JSON to a stream, such as a pipe."""

    is_table: ClassVar[bool] = False

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, rows: Sequence[Row]) -> None:
        """Write one line per row and flush."""
        self._stream.write("".join(to_json(row) + "\n" for row in rows))
        self._stream.flush()

    def finish(self) -> None:
        """Do nothing; the caller owns the stream."""

    close = finish


class RowList:
    """Collect rows in memory."""

    is_table: ClassVar[bool] = False

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, rows: Sequence[Row]) -> None:
        """Append copies of the rows."""
        self.rows += [dict(row) for row in rows]

    def finish(self) -> None:
        """Do nothing."""

    close = finish


class RowFile(ABC):
    """A file of rows, written to a partial file until it is complete."""

    is_table: ClassVar[bool] = True

    def __init__(self, path: Path, columns: RowColumns) -> None:
        self.path = path
        self.columns = columns
        self.partial = partial_of(path)

    # ---- existing rows

    @property
    def existing(self) -> Path | None:
        """The partial file of an interrupted process, else the complete file, else None."""
        return next((path for path in (self.partial, self.path) if path.is_file()), None)

    @abstractmethod
    def read_back(self) -> Iterator[Any]:
        """Yields each complete row already in the file; raises InputError if its columns differ."""

    @abstractmethod
    def as_written(self, row: Row) -> Any:
        """Returns the form in which `read_back` yields a row, without the predicted columns."""

    # ---- writing

    @abstractmethod
    def open(self, keep: int) -> None:
        """Open the file for appending after the first `keep` rows from `read_back`."""

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Write rows with their predicted columns to disk."""

    @abstractmethod
    def close(self) -> None:
        """Close the partial file, which can be resumed."""

    def discard(self) -> None:
        """Close and delete a partial file without rows."""
        self.close()
        self.partial.unlink(missing_ok=True)

    def finish(self) -> None:
        """Flush the partial file and rename it to `path`."""
        self.close()
        with self.partial.open("rb") as file:
            os.fsync(file.fileno())
        self.partial.replace(self.path)


def partial_of(path: Path) -> Path:
    """Returns the path of the partial file of `path`."""
    return path.with_name(f"{path.name}.partial")


def describe_columns(path: Path, columns: Sequence[str], expected: Sequence[str] = ()) -> str:
    """Returns the error for a resumed file whose `columns` are not `expected`, or are missing."""
    if not expected:
        return f"--resume: {path} has rows without {join_names(columns)}. Choose another --output."
    return (
        f"--resume: {path} has the columns {join_names(columns)}, and there would be "
        f"{join_names(expected)}. Use the flags of the interrupted command, or choose another "
        f"--output."
    )
