"""Callbacks through which the engine reports progress to a screen, a log or a notebook.

In a notebook, one output is redrawn as HTML without scripts. Outside notebooks, only warnings are
logged; pass a listener for more.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from ftlevel.config.section import Choice


class Listener:
    """Base class of listeners; its methods do nothing, and are called in the main thread only."""

    def stage(self, name: str) -> None:
        """Start a stage of the work, such as `load the model`."""

    def choices(self, title: str, choices: Sequence[Choice]) -> None:
        """Report settings, each with a value and a reason, under the heading `title`."""

    def progress(self, done: int, total: int) -> None:
        """Report that `done` of `total` examples are encoded."""

    def answered(self, done: int, share: float | None) -> None:
        """Report `done` processed rows, and the `share` (0 to 1) of the input, None if unknown."""

    def warn(self, message: str) -> None:
        """Report a warning that does not change the run."""

    def begin(self, total_steps: int) -> None:
        """Report the start of training, which has `total_steps` optimizer steps."""

    def step(self, step: int) -> None:
        """Report a completed optimizer step."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Report the metrics of a training step or of an evaluation."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """Report the summary of a completed run or dry run."""


NullListener = Listener
"""Listener that ignores all events."""


class Summarized:
    """Base class of results; their text is one line with the metrics of `summary`."""

    summary: Mapping[str, Any]

    def __repr__(self) -> str:
        """Returns the class, the run or output, the metrics, and the size of `summary`."""
        summary = self.summary
        names = (summary.get(key) for key in ("run", "out", "output", "name"))
        name = next((str(each) for each in names if each is not None), "")
        metrics = (summary.get("metrics") or {}).items()
        parts = [name, *(f"{key} {value:.4g}" for key, value in metrics)]
        text = ", ".join([*filter(None, parts), f"summary of {len(summary)} entries"])
        return f"{type(self).__name__}({text})"


_EVERY_S = 0.25  # between redraws
_MAX_ROWS = 8  # last log lines printed
METRIC_FORMATS = {
    "loss": ("loss", "{:.4f}"),
    "reward": ("reward", "{:.3f}"),
    "groups_with_signal": ("signal", "{:.0%}"),
    "failed_rewards": ("failed", "{:.0%}"),
    "completion_length": ("length", "{:.1f}"),
    "truncated": ("cut", "{:.0%}"),
    "entropy": ("entropy", "{:.2f}"),
    "kl": ("kl", "{:.4f}"),
    "clipped": ("clipped", "{:.1%}"),
    "sampled_tokens_per_s": ("sampled", "{:,.0f} tok/s"),
    "trained_tokens_per_s": ("trained", "{:,.0f} tok/s"),
    "learning_rate": ("lr", "{:.2e}"),
    "grad_norm": ("grad", "{:.3g}"),
    "epoch": ("epoch", "{:.2f}"),
}
"""Metric of the training log → label and format on the screen."""


def default_listener() -> Listener:
    """Returns a `Notebook` listener in a notebook, else one that logs warnings."""
    return Notebook() if _in_notebook() else Logged()


class Logged(NullListener):
    """Listener that passes warnings to the logger `ftlevel`."""

    def warn(self, message: str) -> None:
        """Log `message` as a warning."""
        logging.getLogger("ftlevel").warning(message)


def _in_notebook() -> bool:
    if "ipykernel" not in sys.modules or "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return get_ipython() is not None


class Notebook(NullListener):
    """Listener that shows a run in the output of a notebook cell."""

    def __init__(self) -> None:
        self._title, self._stage = "", ""
        self._choices: Sequence[Choice] = ()
        self._warnings: list[str] = []
        self._lines: list[Mapping[str, Any]] = []
        self._scores: list[Mapping[str, Any]] = []
        self._done, self._total = 0.0, 0.0
        self._ended: Mapping[str, Any] = {}
        self._display: Any = None
        self._drawn_at = 0.0

    def stage(self, name: str) -> None:
        """Show the current stage."""
        self._stage, self._done, self._total = name, 0.0, 0.0
        self._draw()

    def choices(self, title: str, choices: Sequence[Choice]) -> None:
        """Show every setting with the reason for its value."""
        self._title, self._choices = title, choices
        self._draw()

    def progress(self, done: int, total: int) -> None:
        """Update the progress bar of encoding."""
        self._move(done, total)

    def answered(self, done: int, share: float | None) -> None:  # noqa: ARG002 - a listener's
        """Update the progress bar of prediction."""
        self._move(share or 0.0, 1.0)

    def warn(self, message: str) -> None:
        """Show a warning."""
        self._warnings.append(message)
        self._draw()

    def begin(self, total_steps: int) -> None:
        """Set the number of training steps for the progress bar."""
        self._total = total_steps

    def step(self, step: int) -> None:
        """Update the progress bar of training."""
        self._move(step, self._total)

    def log(self, record: Mapping[str, Any]) -> None:
        """Show the metrics of a training step or an evaluation."""
        is_evaluation = any(key.startswith("eval_") for key in record)
        (self._scores if is_evaluation else self._lines).append(record)
        self._draw()

    def end(self, summary: Mapping[str, Any]) -> None:
        """Show the path of the finished run, or that it was a dry run."""
        self._ended, self._stage = summary, ""
        self._draw()

    def _move(self, done: float, total: float) -> None:
        self._done, self._total = done, total
        if done >= total or time.monotonic() - self._drawn_at > _EVERY_S:
            self._draw()

    def _draw(self) -> None:
        from IPython.display import HTML, display

        self._drawn_at = time.monotonic()
        drawn = HTML("".join(self._to_html()))
        if self._display is None:
            self._display = display(drawn, display_id=True)
        else:
            self._display.update(drawn)

    def _to_html(self) -> Iterator[str]:
        if self._choices:
            rows = [[c.name, str(c.value), c.reason] for c in self._choices]
            yield f"<details><summary><b>ftlevel</b> {escape(self._title)}: what was chosen, and "
            yield f"why</summary>{_table([], rows)}</details>"
        for message in self._warnings:
            yield f"<div><b>warning:</b> {escape(message)}</div>"
        if self._lines:
            names = [name for name in METRIC_FORMATS if any(name in line for line in self._lines)]
            cells = [
                [
                    f"{line['step']:,}",
                    *(_format_value(METRIC_FORMATS[n][1], line.get(n)) for n in names),
                ]
                for line in self._lines[-_MAX_ROWS:]
            ]
            yield _table(["step", *names], cells)
        if self._scores:
            names = [name for name in self._scores[-1] if name.startswith("eval_")]
            cells = [
                [f"{line['step']:,}", *(_format_value("{:.4f}", line.get(n)) for n in names)]
                for line in self._scores[-_MAX_ROWS:]
            ]
            yield _table(["step", *(name.removeprefix("eval_") for name in names)], cells)
        if self._stage:
            bar = f" <progress value='{self._done:g}' max='{self._total:g}'></progress>"
            yield f"<div>{escape(self._stage)}{bar if self._total else ''}</div>"
        yield from self._result()

    def _result(self) -> Iterator[str]:
        if self._ended.get("dry_run"):
            yield "<div>dry run: everything was checked, nothing was trained or written.</div>"
        elif "run" in self._ended:
            yield f"<div><b>saved</b> {escape(str(self._ended['run']))}</div>"


def _format_value(template: str, value: Any) -> str:
    return "" if value is None else template.format(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:left'>{escape(c)}</td>" for c in row) + "</tr>"
        for row in rows
    )
    return f"<table>{f'<tr>{top}</tr>' if top else ''}{body}</table>"
