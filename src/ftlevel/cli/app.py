"""The `ftlevel` program: dispatches commands and turns errors into messages and exit codes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftlevel._version import __version__
from ftlevel.artifacts.files import format_interrupt
from ftlevel.cli.startup import (
    discard,
    escape_output,
    exit_code,
    heavy_imports,
    install_signal_handlers,
    protect_exit,
    received_signal,
    silence_loggers,
)
from ftlevel.cli.topics import topic_of_error, with_topic
from ftlevel.errors import FtlevelError, Interrupted, is_out_of_memory
from ftlevel.extensions import added_rows, load
from ftlevel.safe_io import escape_controls, escape_json, mask_passwords
from ftlevel.world import is_launched, should_print

if TYPE_CHECKING:
    from ftlevel.config.flag import Flag

HELP = "Fine-tune transformers efficiently: one grammar for every family, task and PEFT method."

_CORE: dict[str, tuple[str, str]] = {
    name: (f"ftlevel.cli.{function}", summary)
    for name, function, summary in (
        ("init", "init:init", "Create a commented recipe from five questions."),
        ("train", "train:train", "Fine-tune a model on a dataset."),
        ("preview", "preview:preview", "Show encoded rows and problems in the data."),
        ("plan", "preview:plan", "Estimate memory and time of a run before it starts."),
        ("evaluate", "evaluate:evaluate", "Evaluate a run, an adapter or a model."),
        ("predict", "evaluate:predict", "Add predictions to the rows of a file."),
        ("generate", "generate:generate", "Generate answers to prompts, or chat in the terminal."),
        ("merge", "merge:merge", "Merge an adapter into the base model and write a full model."),
        ("quantize", "merge:quantize", "Quantize a model to 4 or 8 bits and measure the quality."),
        ("runs", "runs:runs", "List runs with their results, or remove their old checkpoints."),
        ("recipes", "recipes:recipes", "List, show, copy or convert recipes."),
        (
            "list-targets",
            "describe:list_targets",
            "List the modules of a model or a family that can be adapted.",
        ),
        (
            "list-methods",
            "describe:list_methods",
            "List the methods and what they can be combined with.",
        ),
        ("doctor", "describe:doctor", "Check what this machine supports and what to install."),
    )
}
"""Command → function and summary; a test compares the summary with the function's docstring."""


def commands() -> dict[str, tuple[str, str]]:
    """Returns command name → ("module:function", summary), with the commands of extensions."""
    added = added_rows("commands", _CORE)
    return _CORE | {name: (command.function, command.summary) for name, command in added.items()}


def build_app(
    names: Collection[str] | None = None, flags: Sequence[Flag] | None = None
) -> typer.Typer:
    """Build the Typer application.

    Only the commands `names` are imported, which keeps `--help` fast; None imports all. `flags`
    replaces the default table of flags.
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
    for name, (function, summary) in commands().items():
        if names is None or name in names:
            from ftlevel.cli.flags import add_command
            from ftlevel.config.flags import FLAGS

            add_command(app, name, load(function), FLAGS if flags is None else flags)
        else:
            app.command(name=name, help=summary)(_placeholder)
    return app


def _placeholder() -> None:
    """Stand-in for the function of a command that this process lists, but does not import."""


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


_MAX_MESSAGE = 300  # characters
_CTRL_C = 130
_SECONDS_TO_PRINT = 3  # for the process of this machine that prints a usage error
_DISCONNECTED = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


def main() -> None:
    """Run the command line and exit: 2 for bad input, 1 for a failed run, 130 for Ctrl-C."""
    silence_loggers()
    install_signal_handlers(lambda: _end_interrupted(sys.argv[1:]))
    code = run(sys.argv[1:])
    if code == 2 and not should_print():  # launchers kill the other processes when one exits
        time.sleep(_SECONDS_TO_PRINT)
    protect_exit(code)
    raise SystemExit(code)


def run(args: list[str]) -> int:
    """Run one command line and return its exit code; prints every error."""
    escape_output()
    args = args or ["--help"]
    names = [a for a in args if not a.startswith("-")][:1]
    show_traceback = "--traceback" in args
    try:
        # Libraries draw progress bars through tqdm, which reads this when it is first imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
        with heavy_imports():
            app = build_app(names or _completed_command())
        code = _call(app, args)
    except typer.TyperException as error:  # an unknown flag, a missing argument, a bad number
        command = [name for name in names if name in commands()]
        help_command = " ".join(["ftlevel", *command, "--help"])
        return _end(args, f"{error.format_message()} See: {help_command}", 2, "settings")
    except (typer.Abort, KeyboardInterrupt):
        return _end_interrupted(args)
    except FtlevelError as error:
        if show_traceback and not isinstance(error, Interrupted):
            raise
        code = exit_code() if error.exit_code == _CTRL_C else error.exit_code
        # All processes of a machine see a usage error; one prints it.
        if not error.is_reported and (error.exit_code == 1 or should_print()):
            _end(args, str(error), code, topic_of_error(error), error.summary)
        return code
    except Exception as error:  # a full disk, a closed pipe, a malformed file, or a bug
        topic = "memory" if is_out_of_memory(error) else None
        if topic is None and isinstance(error, OSError) and error.strerror is not None:
            message, code, topic = *_format_os_error(error), "output"
        else:
            message, code = _format_unexpected(error)
        if show_traceback:
            _report_json(args, message, code)
            raise
        _end(args, message, code, topic)
        is_stream = topic == "output" and getattr(error, "filename", None) is None
        if is_stream and sys.stdout is not None:
            discard(sys.stdout)
        return code
    except BaseException as error:
        if show_traceback or type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:_MAX_MESSAGE]
        message = f"the tokenizer, or another library in Rust, failed: {reason}. Check the model."
        return _end(args, message, 2, topic_of_error(error))
    return code if isinstance(code, int) else 0


def _completed_command() -> list[str]:
    """Returns the command whose arguments a shell is completing, in a list; [] if there is none."""
    typed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    return [word for word in typed.split()[1:] if not word.startswith("-")][:1]


def _call(app: typer.Typer, args: list[str]) -> Any:
    """Run the command and return the exit code; raises KeyboardInterrupt for Ctrl-C."""
    code = app(args=args, prog_name="ftlevel", standalone_mode=False, obj=args)
    if code == _CTRL_C and received_signal():
        raise KeyboardInterrupt
    return code


def _end_interrupted(args: list[str]) -> int:
    return _end(args, format_interrupt(), exit_code())


def _end(
    args: list[str],
    message: str,
    code: int,
    topic: str | None = None,
    summary: Mapping[str, Any] | None = None,
) -> int:
    message = mask_passwords(message)
    for line in with_topic(message, topic).split("\n"):
        typer.echo(f"ftlevel: {escape_controls(line)}", err=True)  # else it drops some
    _report_json(args, message, code, summary)
    return code


def _report_json(
    args: list[str], message: str, code: int, summary: Mapping[str, Any] | None = None
) -> None:
    if "--json" in args:
        data = {**(summary or {}), "error": message, "exit_code": code}
        with contextlib.suppress(OSError):  # closed pipe
            typer.echo(escape_json(json.dumps(data, ensure_ascii=False, default=str)))


def _format_os_error(error: OSError) -> tuple[str, int]:
    path = error.filename2 or error.filename  # of a copy, the output
    prefix = f"{path}: " if path else ""
    if error.errno == errno.ENAMETOOLONG:  # a path from the user
        return f"{prefix}{error.strerror}. Name a shorter path.", 2
    return f"{prefix}{error.strerror}. Add --traceback to see where it happened.", 1


def _format_unexpected(error: Exception) -> tuple[str, int]:
    if received_signal() or _is_from_ctrl_c(error):
        return format_interrupt(), exit_code()
    if is_out_of_memory(error):
        message = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"out of memory: {message}. Use a smaller batch or a smaller model.", 1
    if is_launched() and any(name in str(error) for name in _DISCONNECTED):
        return "another process of the run has exited.", 1
    message = " ".join(str(error).split())[:_MAX_MESSAGE].rstrip(".")
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    fix = "Unless that file is damaged, this" if notes else "This"
    return (
        f"{type(error).__name__}: {message}{notes}. {fix} is a bug in ftlevel: please report it "
        "with the output of --traceback.",
        1,
    )


def _is_from_ctrl_c(error: BaseException | None) -> bool:
    """Returns whether `error` comes from a KeyboardInterrupt, which an import may have replaced."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False
