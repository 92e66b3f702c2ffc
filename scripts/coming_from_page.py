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

Written by `python scripts/write_docs.py coming-from` from what is typed in other tools' own \
examples, which
`tests/cli/test_spellings.py` holds against the program. Names may have dashes or underscores; a \
switch takes
`true`, `false`, `yes`, `no`, `1` or `0` after a space or `=`; lists have commas or spaces.

Each spelling takes effect, in a field that `ftlevel train … --dry-run --json` shows under \
`config`; or it asks for
what is done anyhow, which is said with the reason and refused where it contradicts; or it is \
answered, with exit
code 2. [cli.md](cli.md) has every second name beside its flag.

A configuration file of Axolotl, LLaMA-Factory, ms-swift, TRL or verl becomes a recipe by

<!-- not run: tests/cli/test_recipes.py converts files of each tool -->

    ftlevel recipes convert FILE > recipe.yaml

which names every key that has no counterpart. Of {count} spellings below, {accepted} are \
accepted."""


def coming_from_page() -> str:
    """Return docs/coming-from.md."""
    accepted = sum(row.is_accepted for row in SPELLINGS)
    head = _HEAD.format(count=len(SPELLINGS), accepted=accepted)
    return "\n".join([head, *_tables()]) + "\n"


def _tables() -> Iterator[str]:
    for tool in dict.fromkeys(row.tool for row in SPELLINGS):
        yield from ("", f"## {tool}", "", "| typed | from | here |", "|---|---|---|")
        for row in SPELLINGS:
            if row.tool == tool:
                cells = (f"`{row.typed}`", row.example, _here(row))
                yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _here(row: Spelled) -> str:
    """Return what comes of a row; of one that is refused, the line that says so."""
    if row.sets:
        fields = ", ".join(f"`{path}: {_shown(value)}`" for path, value in row.sets.items())
        return fields + (f" (beside `{row.beside}`)" if row.beside else "")
    if row.agrees:
        return f"as it is: {row.agrees}"
    try:
        _program()(args=["train", *shlex.split(row.typed), "--dry-run"], standalone_mode=False)
    except ConfigError as error:
        line = str(error)
        return f"refused: {line.partition(': ')[2] or line}"
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
