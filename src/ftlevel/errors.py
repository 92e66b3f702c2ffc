"""The errors that ftlevel raises for its users, and the words they share.

Every message says what is wrong, with the value; what was expected or is available; and the one
thing to do. The library raises, only the command line turns an error into lines and an exit code.
This module imports nothing heavy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence


class FtlevelError(Exception):
    """An error whose message is meant for the user; `exit_code` is what the command returns.

    Attributes:
        is_told: another process of the run says it.
    """

    exit_code = 1
    is_told = False


class ConfigError(FtlevelError):
    """A flag, a recipe key or a combination of them is wrong. Nothing was loaded or written.

    Attributes:
        problems: one message a problem; `str(error)` joins them by newlines.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class InputError(ConfigError):
    """A model, a data file or a directory that the user named cannot be used."""


class UnansweredError(InputError):
    """Some questions cannot be answered; nothing was computed for the others either.

    Attributes:
        reasons: number of a question → why, without a full stop.
    """

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__([f"question {row + 1}: {reason}." for row, reason in reasons.items()])
        self.reasons = dict(reasons)


class RunError(FtlevelError):
    """A run that was well configured failed: a non-finite loss, a dead adapter, a full disk."""


class Interrupted(FtlevelError):
    """The user pressed Ctrl-C, or a signal came; the message says what was kept."""

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
    """Whether a library means by `error` that there is no memory left."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return isinstance(error, (RuntimeError, OSError)) and any(w in text for w in _OUT_OF_MEMORY)


_BEGINNING = 4  # letters from which on the beginning of a name is a wish for it


def nearest(name: str, options: Iterable[str], count: int = 1) -> list[str]:
    """Return the `count` options that look most like `name`, best first; none if none is near.

    Those that `name` is the beginning of come first, in their order: `adamw` is `adamw_torch`.
    """
    names = list(dict.fromkeys(options))
    folded = {option.lower().replace("_", "-"): option for option in names}
    wish = name.lower().replace("_", "-")
    begun = [key for key in folded if len(wish) >= _BEGINNING and key.startswith(wish)]
    close = difflib.get_close_matches(wish, list(folded), n=count, cutoff=0.6)
    return [folded[match] for match in dict.fromkeys([*begun, *close])][:count]


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the option nearest to `name`, or an empty string."""
    found = nearest(name, options)
    return f" Did you mean {found[0]!r}?" if found else ""


def with_article(noun: str) -> str:
    """Return `noun` behind its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


_LONGEST_NAME = 40


def quote(name: object) -> str:
    """Return `name` in quotes as Python writes it, cut where it is long."""
    text = repr(name)
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 3]}…{text[-1]}"


def is_long(name: str) -> bool:
    """Tell whether `quote` cuts the name, which then is none to be typed."""
    return len(repr(name)) > _LONGEST_NAME


def listing(names: Iterable[str], most: int = 12) -> str:
    """Join `names` with commas; past `most` of them, say how many more there are."""
    items = list(names)
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most:,} more"
