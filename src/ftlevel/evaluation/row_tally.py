"""What became of the rows that were to be answered, and what is said about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ftlevel.artifacts.rows.sinks import partial_of
from ftlevel.data.prepare.questions import AskedRow

MOST_SHOWN = 5
"""Rows without an answer that are named; the others are counted."""


@dataclass
class Tally:
    """What became of the rows so far.

    Attributes:
        output: the file that they go to, if any.
        kept: rows that were there already.
        answered: rows that were gone through since.
        skipped: rows of these that have no answer.
        shown: the first of them, with their places and reasons.
        shortened: rows that lost tokens.
        seconds: that answering took, without loading the model.
    """

    output: Path | None
    kept: int = 0
    answered: int = 0
    skipped: int = 0
    shown: list[str] = field(default_factory=list)
    shortened: int = 0
    seconds: float = 0.0

    def skip(self, window: Sequence[AskedRow], faults: Mapping[int, str]) -> None:
        """Count the rows of `window` that have no answer, by their index in it."""
        self.skipped += len(faults)
        self.shown += [f"{window[i].place}: {faults[i]}" for i in sorted(faults)]
        del self.shown[MOST_SHOWN:]

    def describe_bad(self, window: Sequence[AskedRow], faults: Mapping[int, str]) -> list[str]:
        """Return a message for each of the first rows that cannot be answered, and what to do."""
        lines = [f"{window[i].place}: {faults[i]}." for i in sorted(faults)]
        more = f" and {len(lines) - MOST_SHOWN:,} more" if len(lines) > MOST_SHOWN else ""
        rows = "It" if len(lines) == 1 else f"These{more}"
        done = self._describe_done()
        lines = lines[:MOST_SHOWN]
        lines[-1] += (
            f" {rows} cannot be answered. Fix what is wrong, or leave the answer empty by "
            f"--on-bad-row skip.{' ' if done else ''}{done}"
        )
        return lines

    def describe_stop(self) -> str:
        """Return what is said when the user stops the command."""
        return f"interrupted; {self._describe_done() or 'nothing was kept.'}"

    def _describe_done(self) -> str:
        done = self.kept + self.answered
        if self.output is None or not done:
            return ""
        return f"{done:,} rows are in {partial_of(self.output)}: --resume goes on with them."

    def warnings(self) -> Iterator[str]:
        """Yield what the user should know at the end."""
        if self.skipped:
            more = "; …" if self.skipped > len(self.shown) else ""
            yield (
                f"{self.skipped:,} of {self.answered:,} rows have no answer "
                f"({'; '.join(self.shown)}{more})"
            )
        if self.shortened:
            yield f"{self.shortened:,} rows were shortened to what the model takes"
