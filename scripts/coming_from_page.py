"""Generate docs/coming-from.md: equivalents of other tools' flags."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from ftlevel.config.flag import UnsupportedFlag
from ftlevel.config.flags import FLAGS

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from cli.spellings import SPELLINGS, ForeignFlag

_HEAD = """\
# Coming from another tool

This page is for users of other tools. It lists flags from those tools' examples, and what
`ftlevel train` does with each. `--lora_r` and `--lora-r` are the same flag.
`python scripts/write_docs.py coming-from` generates this page.

Of {count} pairs of flag and value, {accepted} are accepted. {same} set one field to the value as
typed, like `--lora_rank 16`; [ftlevel train](commands/train.md) lists these flags. For refused
flags, and those without an effect, ftlevel prints the reason and what to use instead;
[more of them](commands/train.md#not-available).

Configuration files of Axolotl, LLaMA-Factory, ms-swift, TRL and verl are converted, with a note on
each key without a counterpart:

<!-- not run: tests/cli/test_recipes.py -->

    ftlevel recipes convert FILE > recipe.yaml"""


def coming_from_page() -> str:
    """Return docs/coming-from.md."""
    accepted = sum(row.is_accepted for row in SPELLINGS)
    same = sum(map(_is_rename, SPELLINGS))
    head = _HEAD.format(count=len(SPELLINGS), accepted=accepted, same=same)
    return "\n".join([head, *_tables()]) + "\n"


def _tables() -> Iterator[str]:
    shown: set[tuple[str, str]] = set()
    for tool in dict.fromkeys(row.tool for row in SPELLINGS):
        rows = [row for row in SPELLINGS if row.tool == tool and not _is_rename(row)]
        yield from ("", f"## {tool}", "", "| flag | in ftlevel |", "|---|---|")
        for row in rows:
            cells = (f"`{row.typed}`", _effect(row))
            if row.sets and not row.agrees and cells not in shown:  # not of an earlier tool
                shown.add(cells)
                yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield from _list_flags("No effect", (row for row in rows if row.agrees))
        yield from _list_flags("Refused", (row for row in rows if not (row.sets or row.agrees)))


def _list_flags(label: str, rows: Iterable[ForeignFlag]) -> Iterator[str]:
    names = {flag.name for flag in FLAGS if isinstance(flag, UnsupportedFlag)}
    typed = (row.typed for row in rows if row.typed.split()[0].replace("_", "-") not in names)
    if shown := list(dict.fromkeys(f"`{text}`" for text in typed)):
        yield from ("", f"{label}: {', '.join(shown)}.")


def _is_rename(row: ForeignFlag) -> bool:
    """Return whether a flag sets one field to the typed value."""
    typed = shlex.split(row.typed)
    if len(row.sets) != 1 or len(typed) != 2:
        return False
    (value,) = row.sets.values()
    return typed[1] == _format_value(value) or (
        isinstance(value, float) and float(typed[1]) == value
    )


def _effect(row: ForeignFlag) -> str:
    """Return the fields that a flag sets."""
    fields = ", ".join(f"`{path}: {_format_value(value)}`" for path, value in row.sets.items())
    return fields + (f" (with `{row.extra}`)" if row.extra else "")


def _format_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {entry}" for key, entry in value.items()) + "}"
    return str(value)
