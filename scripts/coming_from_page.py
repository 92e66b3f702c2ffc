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
from cli.spellings import SPELLINGS, Spelled

_HEAD = """\
# Coming from another tool

This page is for users of other tools. It lists flags from their examples, and their effect in
ftlevel. Dashes and underscores are equal. The page is generated from `tests/cli/spellings.py` by
`python scripts/write_docs.py coming-from`.

A flag sets fields, is accepted without effect, or is refused with a reason. Of {count} flags with
values, {accepted} are accepted. The tables leave out {same} flags that only have another name,
such as `--lora_rank 16`: [ftlevel train](commands/train.md) lists these names.

Configuration files of Axolotl, LLaMA-Factory, ms-swift, TRL and verl are converted, with a note on
each key without a counterpart:

<!-- not run: tests/cli/test_recipes.py converts files of each tool -->

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
            cells = (f"`{row.typed}`", _here(row))
            if cells not in shown:  # the same of an earlier tool
                shown.add(cells)
                yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        agreeing = dict.fromkeys(row.typed for row in SPELLINGS if row.tool == tool and row.agrees)
        if agreeing:
            names = ", ".join(f"`{typed}`" for typed in agreeing)
            yield from (
                "",
                f"Accepted without effect, because ftlevel always works this way: {names}.",
            )


def _is_rename(row: Spelled) -> bool:
    """Return whether a spelling sets one field to the value that was typed."""
    typed = shlex.split(row.typed)
    if len(row.sets) != 1 or len(typed) != 2:
        return False
    (value,) = row.sets.values()
    return typed[1] == _shown(value) or (isinstance(value, float) and float(typed[1]) == value)


def _here(row: Spelled) -> str:
    """Return what comes of a row; of one that is refused, the line that says so."""
    if row.sets:
        fields = ", ".join(f"`{path}: {_shown(value)}`" for path, value in row.sets.items())
        return fields + (f" (with `{row.beside}`)" if row.beside else "")
    try:
        _program()(args=["train", *shlex.split(row.typed), "--dry-run"], standalone_mode=False)
    except ConfigError as error:
        line = str(error)
        reason = line.partition(": ")[2] or line
        return f"refused: {reason.partition('. ')[0].rstrip('.')}"
    raise ValueError(f"{row.typed} is not refused")


@cache
def _program() -> typer.Typer:
    return build_app(["train"])


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {one}" for key, one in value.items()) + "}"
    return str(value)
