"""Exceptions for users, and helpers that format their messages; imports nothing heavy.

A message states the fact with the value, what was expected, and the fix.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


class FtlevelError(Exception):
    """Base class of errors for the user.

    Attributes:
        is_reported: whether another process prints the error.
        summary: result of the command that failed, which `--json` prints with the error.
    """

    exit_code = 1
    is_reported = False
    summary: Mapping[str, Any] | None = None


class ConfigError(FtlevelError):
    """Invalid flag, recipe key or combination; raised before anything is loaded or written.

    `problems` is a list of messages; `str(error)` joins them with newlines.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class InputError(ConfigError):
    """Unusable model, data file or directory named by the user."""


class UnansweredError(InputError):
    """Prompts that the model cannot answer; raised before any answer is computed.

    `reasons` maps the index of each such prompt to the reason, without a final period.
    """

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__([f"question {row + 1}: {reason}." for row, reason in reasons.items()])
        self.reasons = dict(reasons)


class RunError(FtlevelError):
    """Failure of a valid run, such as a non-finite loss or a full disk."""

    def __init__(self, message: str, summary: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.summary = summary


class Interrupted(FtlevelError):
    """Stop by Ctrl-C or a signal such as SIGTERM; the message says what was saved."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Context manager that adds a note with the file `name` to unexpected exceptions."""
    try:
        yield
    except FtlevelError:
        raise
    except Exception as error:
        # As add_note of Python 3.11 does.
        error.__dict__.setdefault("__notes__", []).append(f"while reading {name}")
        raise


_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, MPS, bitsandbytes
    "DefaultCPUAllocator",
    "could not create a primitive",  # oneDNN
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
    "Cannot allocate memory",
    "malloc of size",  # Arrow
)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether `error` means out of memory (CPU or GPU), whichever library raised it."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return isinstance(error, (RuntimeError, OSError)) and any(t in text for t in _OUT_OF_MEMORY)


_MIN_PREFIX = 4  # characters


def closest_matches(name: str, options: Iterable[str], count: int = 1) -> list[str]:
    """Returns up to `count` options most similar to `name`, best first.

    Options that start with `name` come first: `adamw` matches `adamw_torch`.
    """
    by_name = {option.lower().replace("_", "-"): option for option in options}
    query = name.lower().replace("_", "-")
    starting = [o for o in by_name if len(query) >= _MIN_PREFIX and o.startswith(query)]
    close = difflib.get_close_matches(query, list(by_name), n=count, cutoff=0.6)
    return [by_name[match] for match in dict.fromkeys([*starting, *close])][:count]


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the option most similar to `name`, or ""."""
    matches = closest_matches(name, options)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def with_article(noun: str) -> str:
    """Returns `noun` with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


_MAX_NAME = 40


def quote(name: object) -> str:
    """Returns `repr(name)`, shortened to 40 characters."""
    text = repr(name)
    return text if len(text) <= _MAX_NAME else f"{text[: _MAX_NAME - 3]}…{text[-1]}"


def is_long(name: str) -> bool:
    """Returns whether `repr(name)` is over 40 characters, so that `quote` shortens it."""
    return len(repr(name)) > _MAX_NAME


def join_names(names: Iterable[str], maximum: int = 12) -> str:
    """Returns up to `maximum` names joined by commas, then the number of others: `and 3 more`."""
    items = list(names)
    text = ", ".join(items[:maximum])
    return text if len(items) <= maximum else f"{text} and {len(items) - maximum:,} more"


def needs(setting: str, required: str, reason: str = "", fix: str = "") -> str:
    """Returns the message that `setting` needs `required`; `fix` replaces the last sentence."""
    add = f"Add {required.partition(' (')[0]}, or drop {_flag_of(setting)}."
    return f"{setting} needs {required}{reason and f': {reason}'}. {fix or add}"


def excludes(setting: str, other: str, reason: str = "", fix: str = "") -> str:
    """Returns the message that `setting` and `other` exclude each other."""
    because = reason and f": {reason}"
    return f"{setting} cannot be used with {other}{because}. {fix or 'Drop one of them.'}"


def has_no_effect(setting: str, other: str, reason: str = "", fix: str = "") -> str:
    """Returns the message that `setting` has no effect with `other`."""
    because = reason and f": {reason}"
    return f"{setting} has no effect with {other}{because}. {fix or 'Drop it.'}"


def _flag_of(setting: str) -> str:
    return setting.partition(" ")[0].partition("=")[0]
