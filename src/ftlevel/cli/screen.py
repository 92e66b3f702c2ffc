"""Terminal output of a run: settings, progress bars, metrics; plain lines in a pipe.

A closed or full output stream must not end the run.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TextIO, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from ftlevel._version import __version__
from ftlevel.artifacts.cards import describe_losses, format_memory, format_selected_model
from ftlevel.cli.startup import SafeStream, raw_stream
from ftlevel.cli.topics import topic_of_module, with_topic
from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError, FtlevelError
from ftlevel.events import METRIC_FORMATS, Listener
from ftlevel.safe_io import escape_controls, mask_passwords, open_existing

_RUN_FILES = (
    ("adapter", "adapter and tokenizer"),
    ("base", "its base model"),
    ("checkpoints", "for --resume"),
    ("tensorboard", "TensorBoard logs"),
    ("config.yaml", "full configuration"),
    ("metrics.jsonl", "training log"),
    ("summary.json", "all results"),
    ("validation.jsonl", "predictions for validation rows"),
    ("rollouts.jsonl", "sampled completions with rewards"),
    ("README.md", "model card"),
    ("report.html", "HTML report"),
)
"""Files of a run directory and their purpose."""

_CLOSED_PIPE = 128 + 13
"""Exit code that shells report for SIGPIPE."""

_BAR, _ROOM_FOR_BAR, _ROOM_FOR_FIGURES = 20, 80, 60  # columns of the terminal


class Screen(Listener):
    """Listener that prints a run to a console; if `quiet`, prints only warnings, to `errors`."""

    def __init__(self, console: Console, *, quiet: bool, errors: Console | None = None) -> None:
        self.console = console
        self.errors = errors or console
        self.quiet = quiet
        self._progress: Progress | None = None
        self._task_id: Any = None
        self._total = 0
        self._seen: tuple[float, int] | None = None
        self._first = 0
        self._has_title = False

    def exit_if_closed(self) -> None:
        """Raise Exit with SIGPIPE's exit code if the other end of the pipe is closed."""
        stream = self.console.file
        if isinstance(stream, SafeStream) and not stream.has_reader():
            raise typer.Exit(_CLOSED_PIPE)

    def stage(self, name: str) -> None:
        """Show the current stage."""
        self.close()
        if not self.quiet:
            self.console.print(f"[dim]· {name}[/dim]", highlight=False)

    def choices(self, title: str, choices: Sequence[Choice]) -> None:
        """Show every setting with the reason for its value; the first call also shows `title`."""
        if self.quiet:
            return
        if not self._has_title:
            self._line(f"[bold]ftlevel {__version__}[/bold] {title}")
            self._has_title = True
        if not self.console.is_terminal:
            for choice in choices:
                self._line(escape(f"  {choice.name}: {choice}"))
            return
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 2))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for choice in choices:
            reason = f" [dim]({escape(choice.reason)})[/dim]" if choice.reason else ""
            table.add_row(escape(choice.name), f"{escape(str(choice.value))}{reason}")
        self.console.print(table, highlight=False)

    def progress(self, done: int, total: int) -> None:
        """Show the number of encoded examples (terminal only)."""
        if self.quiet or not self.console.is_terminal:
            return
        if self._progress is None:
            text = TextColumn("  encode {task.completed:,.0f}/{task.total:,.0f} rows")
            self._start(text, BarColumn(), TimeRemainingColumn(), total=total)
        self._update(completed=done, total=total)
        if done == total:
            self.close()

    def answered(self, done: int, share: float | None) -> None:
        """Show processed rows, speed and time left (terminal only)."""
        if self.quiet or not self.console.is_terminal:
            return
        if self._progress is None:
            self._first = done
            self._start(
                TextColumn("  {task.fields[rows]:,} rows"),
                BarColumn(bar_width=_BAR),
                TimeRemainingColumn(),
                TextColumn("left"),
                TextColumn("{task.fields[speed]}"),
                rows=done,
                speed="",
            )
            return
        elapsed = self._progress.tasks[0].elapsed or 0.0
        speed = f"{(done - self._first) / elapsed:,.1f} rows/s" if elapsed else ""
        total = None if share is None else 1.0
        self._update(completed=share or 0, rows=done, speed=speed, total=total)

    def warn(self, message: str) -> None:
        """Show a warning, even if quiet."""
        frame = inspect.currentframe()
        caller = frame.f_back if frame else None
        topic = topic_of_module(caller.f_globals["__name__"]) if caller else None
        self._warn(escape(mask_passwords(with_topic(message, topic))))

    def _warn(self, text: str) -> None:
        self.errors.print(f"[yellow]warning:[/yellow] {text}", highlight=False)

    def begin(self, total_steps: int) -> None:
        """Start the progress bar (terminal only)."""
        self._total = total_steps
        if self.quiet or not self.console.is_terminal:
            return
        # On narrow terminals, the metrics are omitted first: the lines above show them, too.
        width, whole = self.console.width, Column(no_wrap=True)
        bar = [BarColumn(bar_width=_BAR)] if width >= _ROOM_FOR_BAR else []
        texts = [TextColumn("{task.fields[texts]}", table_column=Column(overflow="ellipsis"))]
        self._start(
            TextColumn("  step {task.completed:,.0f}/{task.total:,.0f}", table_column=whole),
            *bar,
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("left", table_column=Column(no_wrap=True)),
            *(texts if width >= _ROOM_FOR_FIGURES else []),
            total=total_steps,
            texts="",
        )

    def _start(self, *columns: ProgressColumn, total: float | None = None, **fields: Any) -> None:
        self._progress = Progress(*columns, console=self.console, transient=True)
        self._progress.start()
        self._task_id = self._progress.add_task("", total=total, **fields)

    def _update(self, **fields: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task_id, **fields)

    def step(self, step: int) -> None:
        """Update the progress bar."""
        self._update(completed=step)

    def log(self, record: Mapping[str, Any]) -> None:
        """Show the metrics of a training step or an evaluation."""
        if self.quiet:
            return
        scores = {k.removeprefix("eval_"): v for k, v in record.items() if k.startswith("eval_")}
        if scores:
            text = escape("  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
            self._line(f"  [green]evaluation at step {record['step']:,}[/green]  {text}")
            return
        parts = [
            f"{label} {form.format(record[key])}"
            for key, (label, form) in METRIC_FORMATS.items()
            if key in record
        ]
        parts += [
            f"{name} {value:.3f}" for name, value in record.items() if name.startswith("reward_")
        ]
        if "trained_tokens_per_s" not in record:
            parts.append(self._speed(record))
        texts = "  ".join(part for part in parts if part)
        if self._progress is not None:
            first = ("loss", "reward ")
            short = [part for part in parts if part.startswith(first) or part.endswith("tok/s")]
            self._update(texts="  ".join(short))
        self._line(f"  step {record['step']:>{len(str(self._total))}}/{self._total}  {texts}")

    def _speed(self, record: Mapping[str, Any]) -> str:
        now = (float(record["train_s"]), int(record["tokens"]))
        before, self._seen = self._seen, now
        if before is None or now[0] <= before[0]:
            return ""
        return f"{(now[1] - before[1]) / (now[0] - before[0]):,.0f} tok/s"

    def end(self, summary: Mapping[str, Any]) -> None:
        """Show the results of the run and its path."""
        self.close()
        if self.quiet:
            return
        if summary.get("dry_run"):
            self.console.print(
                "  dry run: everything was checked, nothing was trained or written.",
                highlight=False,
            )
            return
        if "nothing_left" in summary:
            self._line(f"  {escape(summary['nothing_left'])}")
            return
        for line in _result_lines(summary):
            self.console.print(line, highlight=False)

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def close(self) -> None:
        """Remove the progress bar from the terminal."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _in_both(name: str) -> Callable[..., None]:
    """Returns a method that calls the method `name` of the screen and of its log."""

    def method(screen: _LoggedScreen, *args: Any) -> None:
        getattr(Screen, name)(screen, *args)
        getattr(screen.file, name)(*args)

    return method


class _LoggedScreen(Screen):
    """Screen whose lines are also printed by `file`, a screen of a log file."""

    file: Screen
    stage, choices, log, begin, end, _warn = map(
        _in_both, ("stage", "choices", "log", "begin", "end", "_warn")
    )


def _result_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    proof, timings = summary["proof"], summary["timings"]
    if summary["loss_first"] is not None:
        yield f"  [bold]loss[/bold] {describe_losses(summary)}"
    if summary.get("best"):
        yield f"  [bold]best model[/bold] {format_selected_model(summary['best'])}"
    before = summary["metrics_before"]
    for name, value in summary["metrics"].items():
        text = f"{value:.4f}{_range(summary, name, 'intervals')}"
        if name in before:
            first = f"{before[name]:.4f}{_range(summary, name, 'intervals_before')}"
            text = f"{first} → {text}"
        yield f"  [bold]{escape(name)}[/bold] {text}  [dim](validation)[/dim]"
    frozen = (
        f"{proof['frozen_tensors']:,} frozen tensors unchanged; "
        if (proof["frozen_tensors"])
        else ""
    )
    count, idle = proof["gradient_tensors"], proof["idle_tensors"]
    # Without gradient tensors, no step was left.
    gradients = f"{count - idle:,} of {count:,} trainable tensors had gradients; " if count else ""
    yield (
        f"  [bold]proof[/bold] {gradients}{frozen}reloaded and compared: outputs differ by "
        f"{proof['reload_difference']:.2g}, training moved them by {proof['adapter_effect']:.3g}"
    )
    yield (
        f"  [bold]speed[/bold] {timings['tokens_per_s']:,.0f} tokens/s; "
        f"{timings['total_s']:.1f} s in all, {timings['to_first_step_s']:.1f} s to the first step; "
        f"peak memory {summary['memory']['peak_bytes'] / 2**30:.2f} GiB"
    )
    if memory := format_memory(summary):
        yield f"  [bold]plan[/bold] {memory}"
    run = Path(summary["run"])
    files = [f"{name} ({what})" for name, what in _RUN_FILES if _has_content(run / name)]
    yield f"  [bold]saved[/bold] {escape(summary['run'])}: {escape(', '.join(files))}"
    if "hub" in summary:
        yield f"  [bold]uploaded[/bold] {escape(summary['hub'])}"
    for number, command in enumerate(summary["next"]):
        yield f"  {'    ' if number else '[bold]next[/bold]'} {escape(command)}"


def _range(summary: Mapping[str, Any], name: str, which: str) -> str:
    bounds = summary[which].get(name) if "intervals_before" in summary else None
    return "" if bounds is None else f" [{bounds[0]:.4f}, {bounds[1]:.4f}]"


def _has_content(path: Path) -> bool:
    """Returns whether `path` exists; for checkpoints/, whether it has a checkpoint."""
    return path.exists() and (path.name != "checkpoints" or any(path.glob("checkpoint-*")))


class EscapingConsole(Console):
    """Console that prints control characters of texts as escapes; its own styles are unchanged."""

    def render_str(self, text: str, **kwargs: Any) -> Text:
        """Convert `text` to a `Text`, escaped before its width is measured."""
        return super().render_str(escape_controls(text), **kwargs)

    def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
        """Yields segments, escaped unless they are rich's own control sequences."""
        for text, style, control in super().render(*args, **kwargs):
            yield Segment(text if control else escape_controls(text), style, control)


def _console(stream: SafeStream) -> Console:
    return EscapingConsole(file=cast("IO[str]", stream), soft_wrap=not stream.isatty())


@contextlib.contextmanager
def open_screen(
    *, as_json: bool, quiet: bool, to_stderr: bool = False, log_file: Path | None = None
) -> Iterator[Screen]:
    """Context manager that yields a `Screen` and closes it.

    With `as_json`, the screen prints to stderr, and only if stderr is a terminal. All lines and
    errors are appended to `log_file`; raises ConfigError if it cannot be written.
    """
    out, err = (SafeStream(raw_stream(stream)) for stream in (sys.stdout, sys.stderr))
    stream = err if as_json or to_stderr else out
    silent = quiet or (as_json and not stream.isatty())
    consoles: dict[str, Any] = {"errors": _console(err), "quiet": silent}
    if log_file is None:
        screen = Screen(_console(stream), **consoles)
        with contextlib.closing(screen):
            yield screen
        return
    try:
        file = open_existing(log_file)
    except OSError as error:
        raise ConfigError(f"--log-file {log_file}: {error.strerror}. Choose another.") from None
    with file:
        screen = _LoggedScreen(_console(stream), **consoles)
        screen.file = Screen(_console(SafeStream(cast("TextIO", file))), quiet=False)
        try:
            with contextlib.closing(screen):
                yield screen
        except FtlevelError as error:
            file.write(f"ftlevel: {escape_controls(mask_passwords(str(error)))}\n")
            raise
