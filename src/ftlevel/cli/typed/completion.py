"""What a shell is offered while a command line is typed; Typer's machinery asks and answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what --help of the program does not need takes longer than all of it
    from ftlevel.config.field_facts import FieldFacts
    from ftlevel.config.flag import Flag

_RECIPES = ("*.yaml", "*.yml", "recipes/*.yaml", "recipes/*.yml")
_RUNS = ("*/.ftlevel.json", "runs/*/.ftlevel.json")  # what marks a directory as a run's


def completed_command() -> list[str]:
    """Return the command whose line a shell wants to complete, if one does.

    Typer's scripts say in the environment what was typed so far.
    """
    typed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    return [word for word in typed.split()[1:] if not word.startswith("-")][:1]


def completer(row: Flag, facts: FieldFacts | None) -> Callable[[str], list[str]]:
    """Return what gives the values of `row` that begin with what was typed.

    Nothing, where a value is anything: then the shell completes files.
    """

    def complete(incomplete: str) -> list[str]:
        return sorted(value for value in _values(row, facts) if value.startswith(incomplete))

    return complete


def _values(row: Flag, facts: FieldFacts | None) -> list[str]:
    if facts is not None and facts.choices:
        return list(facts.choices)
    if row.dest == "recipe_file" or row.shown == "--recipe":
        return [str(path) for pattern in _RECIPES for path in Path().glob(pattern)]
    if row.shown == "--task":
        from ftlevel.config.tasks import TASKS

        return list(TASKS)
    if "RUN" in (row.metavar or row.names).split(".")[0].split("|"):
        return [str(path.parent) for pattern in _RUNS for path in Path().glob(pattern)]
    if "FAMILY" in row.shown or "FAMILY" in (row.metavar or ""):
        from ftlevel.models.families import FAMILIES

        return list(FAMILIES)
    return []
