"""Generate docs/coming-from.md: equivalents of other tools' flags."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import typer

from ftlevel.cli.app import build_app
from ftlevel.errors import ConfigError

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from cli.spellings import SPELLINGS, ForeignFlag

_HEAD = """\
# Coming from another tool

This page is for users of other tools. It lists flags from those tools' examples, and what
`ftlevel train` does with each. `--lora_r` and `--lora-r` are the same flag.
`python scripts/write_docs.py coming-from` generates this page.

Of {count} pairs of flag and value, {accepted} are accepted; the others are refused with a reason.
{same} set one field to the value as typed, like `--lora_rank 16`;
[ftlevel train](commands/train.md) lists these flags.

Configuration files of Axolotl, LLaMA-Factory, ms-swift, TRL and verl are converted, with a note on
each key without a counterpart:

<!-- not run: see tests/cli/test_recipes.py -->

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
        yield from ("", f"## {tool}", "", "| flag | in ftlevel |", "|---|---|")
        for row in SPELLINGS:
            if row.tool != tool or _is_rename(row) or row.agrees:
                continue
            cells = (f"`{row.typed}`", _effect(row))
            if cells not in shown:  # not listed for an earlier tool
                shown.add(cells)
                yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        agreeing = dict.fromkeys(row.typed for row in SPELLINGS if row.tool == tool and row.agrees)
        if agreeing:
            names = ", ".join(f"`{typed}`" for typed in agreeing)
            yield from ("", f"These have no effect; ftlevel prints why: {names}.")


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
    """Return the effect of a flag, or the reason of its rejection."""
    if row.sets:
        fields = ", ".join(f"`{path}: {_format_value(value)}`" for path, value in row.sets.items())
        return fields + (f" (with `{row.extra}`)" if row.extra else "")
    try:
        _program()(args=["train", *shlex.split(row.typed), "--dry-run"], standalone_mode=False)
    except ConfigError as error:
        line = str(error)
        flag, _, reason = line.partition(": ")
        if ". " in flag:  # of two sentences, the second says what to do
            reason = line.partition(". ")[2]
            reason = reason[:1].lower() + reason[1:]
        return f"refused: {(reason or line).partition('. ')[0].rstrip('.')}"
    raise ValueError(f"{row.typed} is not refused")


@cache
def _program() -> typer.Typer:
    return build_app(["train"])


def _format_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {entry}" for key, entry in value.items()) + "}"
    return str(value)
