"""Other tools' command lines: each spelling takes effect, agrees with what is done, or is answered."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import typer

from cli.spellings import SPELLINGS, Spelled
from ftlevel.cli.app import run
from ftlevel.cli.flags import Given, add_command, read_config
from ftlevel.config import TrainConfig
from ftlevel.config.flags import FLAGS

_FOUND: list[TrainConfig] = []


@cache
def _program() -> typer.Typer:
    def command(given: Given) -> None:
        _FOUND.append(read_config(given)[0])

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    add_command(app, "train", command, FLAGS)
    return app


def resolve(arguments: Sequence[str]) -> TrainConfig:
    """Return the configuration of a command line of train."""
    _program()(args=list(arguments), standalone_mode=False)
    return _FOUND.pop()


def field_of(config: TrainConfig, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part, None)  # a field of another method
    return value if path != "output.dir" else str(value)


ACCEPTED = [row for row in SPELLINGS if row.sets]
AGREEING = [row for row in SPELLINGS if row.agrees]
ANSWERED = [row for row in SPELLINGS if row.answer]


def _names(rows: Sequence[Spelled]) -> list[str]:
    return [f"{row.tool}: {row.typed}" for row in rows]


@pytest.mark.parametrize("row", ACCEPTED, ids=_names(ACCEPTED))
def test_a_spelling_takes_effect(row: Spelled) -> None:
    beside = shlex.split(row.beside)
    config = resolve([*shlex.split(row.typed), *beside])
    before = resolve(beside)
    for path, value in row.sets.items():
        assert field_of(config, path) == value
        assert field_of(before, path) != value


@pytest.mark.parametrize("row", AGREEING, ids=_names(AGREEING))
def test_a_spelling_agrees_and_says_why(row: Spelled, capsys: pytest.CaptureFixture[str]) -> None:
    typed = shlex.split(row.typed)
    assert resolve(typed) == resolve([])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {typed[0].replace('_', '-')}")
    assert row.agrees in line


@pytest.mark.parametrize("row", ANSWERED, ids=_names(ANSWERED))
def test_a_spelling_is_answered(row: Spelled, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", *shlex.split(row.typed), "--dry-run"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert row.answer in line


def test_three_quarters_are_accepted() -> None:
    accepted = sum(row.is_accepted for row in SPELLINGS)
    assert len(SPELLINGS) >= 150
    assert accepted >= 0.75 * len(SPELLINGS)
    assert all(bool(row.sets) + bool(row.agrees) + bool(row.answer) == 1 for row in SPELLINGS)
    doubles = Counter((row.tool, row.typed) for row in SPELLINGS)
    assert [key for key, count in doubles.items() if count > 1] == []
