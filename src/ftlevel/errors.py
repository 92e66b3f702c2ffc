"""Exceptions for users, and helpers that format their messages; imports nothing heavy.

A message states the fact with the value, what was expected, and the fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence


class FtlevelError(Exception):
    """Base class of errors meant for the user; `is_reported` if another process prints it."""

    exit_code = 1
    is_reported = False


class ConfigError(FtlevelError):
    """Invalid flag, recipe key or combination; raised before anything is loaded or written.

    `problems` has one message per problem; `str(error)` joins them with newlines.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class InputError(ConfigError):
    """Unusable model, data file or directory named by the user."""


class UnansweredError(InputError):
    """Prompts that cannot be answered; raised before any prompt is computed.

    `reasons` maps the index of a prompt to the reason, without a full stop.
    """

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__([f"question {row + 1}: {reason}." for row, reason in reasons.items()])
        self.reasons = dict(reasons)


class RunError(FtlevelError):
    """Failure of a valid run, such as a non-finite loss or a full disk."""


class Interrupted(FtlevelError):
    """Ctrl-C or another signal; the message names what was saved."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


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
    """Return whether `error` reports that memory ran out, in any of the libraries."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return isinstance(error, (RuntimeError, OSError)) and any(w in text for w in _OUT_OF_MEMORY)


_BEGINNING = 4  # minimum length of a prefix match


def closest_matches(name: str, options: Iterable[str], count: int = 1) -> list[str]:
    """Return up to `count` options most similar to `name`, best first.

    Options that start with `name` come first: `adamw` matches `adamw_torch`.
    """
    names = list(dict.fromkeys(options))
    folded = {option.lower().replace("_", "-"): option for option in names}
    wish = name.lower().replace("_", "-")
    begun = [key for key in folded if len(wish) >= _BEGINNING and key.startswith(wish)]
    close = difflib.get_close_matches(wish, list(folded), n=count, cutoff=0.6)
    return [folded[match] for match in dict.fromkeys([*begun, *close])][:count]


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the option most similar to `name`, or ""."""
    found = closest_matches(name, options)
    return f" Did you mean {found[0]!r}?" if found else ""


def with_article(noun: str) -> str:
    """Return `noun` with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


_LONGEST_NAME = 40


def quote(name: object) -> str:
    """Return `repr(name)`, shortened to 40 characters."""
    text = repr(name)
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 3]}…{text[-1]}"


def is_long(name: str) -> bool:
    """Return whether `quote` shortens `name`."""
    return len(repr(name)) > _LONGEST_NAME


def join_names(names: Iterable[str], most: int = 12) -> str:
    """Join `names` with commas; after `most` names, append the number of the others."""
    items = list(names)
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most:,} more"
