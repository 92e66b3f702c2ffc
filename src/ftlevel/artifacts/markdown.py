"""Names of strangers in Markdown: labels, files, models and runs stay text on their line."""

from __future__ import annotations

import re

from ftlevel.safe_io import escape_controls

_SPECIAL = re.compile(r"[\\`*\[\]<>|&~]")


def one_line(text: object) -> str:
    """Returns `text` on one line, without control characters."""
    return escape_controls(str(text)).replace("\n", "\\n").replace("\t", " ")


def plain(text: object) -> str:
    """Returns `text` on one line, with escapes where Markdown or HTML would begin."""
    return _SPECIAL.sub(r"\\\g<0>", one_line(text))


def code(text: object) -> str:
    """Returns `text` as a code span; the fence is longer than those in `text`."""
    line = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if len(fence) > 1 else f"`{line}`"
