"""Callbacks through which the engine reports progress to a screen, a log or a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ftlevel.config.section import Choice
from ftlevel.extensions import resolve_renamed


class Listener:
    """Progress callbacks, all called from the main thread; those not overridden do nothing."""

    def stage(self, name: str) -> None:
        """Start a stage of the work, such as `load the model`."""

    def choices(self, title: str, choices: Sequence[Choice]) -> None:
        """Report resolved settings."""

    def progress(self, done: int, total: int) -> None:
        """Report the number of encoded examples."""

    def answered(self, done: int, share: float | None) -> None:
        """Report the number of processed rows, and their `share` (0 to 1) if known."""

    def warn(self, message: str) -> None:
        """Report a warning that does not change the run."""

    def begin(self, total_steps: int) -> None:
        """Report the start of training."""

    def step(self, step: int) -> None:
        """Report a completed optimizer step."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Report training metrics of a step, or metrics of an evaluation."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """Report the summary of a completed run or dry run."""


NullListener = Listener
"""Listener that ignores all events."""

__getattr__ = resolve_renamed(__name__, {"Silence": "ftlevel.events:NullListener"})
