"""What the engine tells whoever listens: a screen, a log, or nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ftlevel.config.section import Choice


class Listener(Protocol):
    """Receives the course of a run. Every method may be called from the main thread only."""

    def stage(self, name: str) -> None:
        """A part of the work begins, such as `load the model`."""

    def choices(self, title: str, choices: Sequence[Choice]) -> None:
        """What the run is made of is resolved."""

    def progress(self, done: int, total: int) -> None:
        """So many of so many examples are encoded."""

    def answered(self, done: int, share: float | None) -> None:
        """So many rows are answered; `share` of all, from 0 to 1, where that is known."""

    def warn(self, message: str) -> None:
        """Something the user should know; the run is still what was asked for."""

    def begin(self, total_steps: int) -> None:
        """Training begins."""

    def step(self, step: int) -> None:
        """An optimizer step is done."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Loss, learning rate and speed at a step, or the metrics of an evaluation."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """The run is done, or, with `--dry-run`, would begin."""


class Silence:
    """A listener that says nothing."""

    def stage(self, name: str) -> None:
        """Ignore it."""

    def choices(self, title: str, choices: Sequence[Choice]) -> None:
        """Ignore it."""

    def progress(self, done: int, total: int) -> None:
        """Ignore it."""

    def answered(self, done: int, share: float | None) -> None:
        """Ignore it."""

    def warn(self, message: str) -> None:
        """Ignore it."""

    def begin(self, total_steps: int) -> None:
        """Ignore it."""

    def step(self, step: int) -> None:
        """Ignore it."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Ignore it."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """Ignore it."""
