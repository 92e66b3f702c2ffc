"""The `ftlevel` program: dispatches commands and turns errors into messages and exit codes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftlevel._version import __version__
from ftlevel.artifacts.files import describe_interrupt
from ftlevel.cli.startup import (
    discard,
    exit_code,
    heavy_imports,
    install_signal_handlers,
    protect_exit,
    received_signal,
    silence_loggers,
)
from ftlevel.errors import FtlevelError, Interrupted, is_out_of_memory
from ftlevel.extensions import added_rows, load
from ftlevel.world import is_launched, prints_errors

if TYPE_CHECKING:
    from ftlevel.config.flag import Flag

HELP = "Fine-tune transformers efficiently: one grammar for every family, task and PEFT method."

_CORE: dict[str, tuple[str, str]] = {
    "init": (
        "ftlevel.cli.init:init",
        "Create a commented recipe from five questions.",
    ),
    "train": ("ftlevel.cli.train:train", "Fine-tune a model on a dataset."),
    "preview": (
        "ftlevel.cli.preview:preview",
        "Show encoded rows and problems in the data.",
    ),
    "plan": (
        "ftlevel.cli.plan:plan",
        "Estimate memory and time of a run before it starts.",
    ),
    "evaluate": (
        "ftlevel.cli.evaluate:evaluate",
        "Evaluate a run, an adapter or a model.",
    ),
    "predict": (
        "ftlevel.cli.evaluate:predict",
        "Add predictions to the rows of a file.",
    ),
    "mine": (
        "ftlevel.cli.mine:mine",
        "Add hard negatives to queries with positives.",
    ),
    "generate": (
        "ftlevel.cli.generate:generate",
        "Generate answers to prompts, or chat in the terminal.",
    ),
    "merge": (
        "ftlevel.cli.export:merge",
        "Merge an adapter into its base model and write a full model.",
    ),
    "quantize": (
        "ftlevel.cli.export:quantize",
        "Quantize a model to 4 or 8 bits and measure its quality.",
    ),
    "export": (
        "ftlevel.cli.export:export",
        "Export a run, an adapter or a model for a server.",
    ),
    "recipes": (
        "ftlevel.cli.recipes:recipes",
        "List, show, copy or convert recipes.",
    ),
    "list-targets": (
        "ftlevel.cli.list_targets:list_targets",
        "List the modules of a model or a family that can be adapted.",
    ),
    "list-methods": (
        "ftlevel.cli.list_methods:list_methods",
        "List the methods and what they can be combined with.",
    ),
    "doctor": (
        "ftlevel.cli.doctor:doctor",
        "Check what this machine supports and what to install.",
    ),
}
"""Command → (function, summary); a test compares the summary with the function's docstring."""


def commands() -> dict[str, tuple[str, str]]:
    """Return name → (function, summary) of the core's commands and those of extensions."""
    added = added_rows("commands", _CORE)
    return _CORE | {name: (own.function, own.summary) for name, own in added.items()}


def build_app(
    wanted: Collection[str] | None = None, flags: Sequence[Flag] | None = None
) -> typer.Typer:
    """Build the Typer application.

    Only `wanted` commands are imported, which keeps `--help` fast; None imports all. `flags`
    replaces the table of flags.
    """
    app = typer.Typer(
        name="ftlevel",
        help=HELP,
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # importing rich and drawing panels doubles the time of --help
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, (place, summary) in commands().items():
        if wanted is None or name in wanted:
            from ftlevel.cli.flags import add_command
            from ftlevel.config.flags import FLAGS

            add_command(app, name, load(place), FLAGS if flags is None else flags)
        else:
            app.command(name=name, help=summary)(_placeholder)
    return app


def _placeholder() -> None:
    """Placeholder for a command that this process does not run."""


def _version(value: bool) -> None:
    if value:
        typer.echo(f"ftlevel {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


_MAX_REASON = 300  # characters

_CTRL_C = 130
_PEER_IS_GONE = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


def main() -> None:
    """Run the command line and exit: 2 for bad input, 1 for a failed run, 130 for Ctrl-C."""
    silence_loggers()
    install_signal_handlers(lambda: _end_interrupted(sys.argv[1:]))
    code = run(sys.argv[1:])
    protect_exit(code)
    raise SystemExit(code)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; prints every error."""
    arguments = arguments or ["--help"]
    wanted = [a for a in arguments if not a.startswith("-")][:1]
    try:
        # Libraries draw progress bars through tqdm, which reads this when it is first imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
        with heavy_imports():
            app = build_app(wanted or _completed_command())
        code = _call(app, arguments)
    except typer.TyperException as error:  # an unknown flag, a missing argument, a bad number
        known = [name for name in wanted if name in commands()]
        message = f"{error.format_message()} See: ftlevel {' '.join([*known, '--help'])}"
        _report(message)
        _report_json(arguments, message, 2)
        return 2
    except typer.Abort:
        return _end_interrupted(arguments)
    except FtlevelError as error:
        if "--traceback" in arguments and not isinstance(error, Interrupted):
            raise
        code = exit_code() if error.exit_code == _CTRL_C else error.exit_code
        # All processes of a machine see a usage error; one prints it.
        if not error.is_reported and (error.exit_code == 1 or prints_errors()):
            _report(str(error))
            _report_json(arguments, str(error), code)
        return code
    except KeyboardInterrupt:
        return _end_interrupted(arguments)
    except OSError as error:  # full disk, closed pipe, removed file
        if "--traceback" in arguments or error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        is_mistake = error.errno == errno.ENAMETOOLONG  # a path from the user is too long
        advice = "Name a shorter path" if is_mistake else "Add --traceback to see where it happened"
        message = f"{where}{error.strerror}. {advice}."
        code = 2 if is_mistake else 1
        _report(message)
        _report_json(arguments, message, code)
        if error.filename is None and sys.stdout is not None:
            discard(sys.stdout)
        return code
    except Exception as error:  # a malformed file, or a bug
        message, code = _describe_unexpected(error)
        _report_json(arguments, message, code)
        if "--traceback" in arguments:
            raise
        _report(message)
        return code
    return code if isinstance(code, int) else 0


def _completed_command() -> list[str]:
    """Return the command being completed by a shell, from Typer's variables, if any."""
    typed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    return [word for word in typed.split()[1:] if not word.startswith("-")][:1]


def _call(app: typer.Typer, arguments: list[str]) -> Any:
    """Run the command; KeyboardInterrupt if interrupted while parsing, which Typer hides."""
    code = app(args=arguments, prog_name="ftlevel", standalone_mode=False, obj=arguments)
    if code == _CTRL_C and received_signal():
        raise KeyboardInterrupt
    return code


def _end_interrupted(arguments: list[str]) -> int:
    code, message = exit_code(), describe_interrupt()
    _report(message)
    _report_json(arguments, message, code)
    return code


def _describe_unexpected(error: Exception) -> tuple[str, int]:
    """Return the message and exit code of an unexpected error."""
    if received_signal() or _is_from_ctrl_c(error):
        return describe_interrupt(), exit_code()
    if is_out_of_memory(error):
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"out of memory: {reason}. Use a smaller batch or a smaller model.", 1
    if is_launched() and any(word in str(error) for word in _PEER_IS_GONE):
        return "another process of the run has exited.", 1
    reason = " ".join(str(error).split())[:_MAX_REASON]
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    advice = "Unless that file is damaged, this" if notes else "This"
    return (
        f"{type(error).__name__}: {reason}{notes}. {advice} is a bug in ftlevel: please report it "
        "with the output of --traceback.",
        1,
    )


def _is_from_ctrl_c(error: BaseException | None) -> bool:
    """Return whether `error` was caused by Ctrl-C; transformers' imports replace it."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _report_json(arguments: list[str], message: str, code: int) -> None:
    if "--json" not in arguments:
        return
    with contextlib.suppress(OSError):  # closed pipe
        typer.echo(json.dumps({"error": message, "exit_code": code}, ensure_ascii=False))


def _report(message: str) -> None:
    for line in message.split("\n"):
        typer.echo(f"ftlevel: {line}", err=True)
