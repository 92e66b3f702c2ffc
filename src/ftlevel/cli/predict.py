"""`ftlevel predict`: add predictions to the rows of a file."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Mapping
from typing import Any

import typer

from ftlevel.cli.flags import CommandInput
from ftlevel.cli.startup import heavy_imports
from ftlevel.config import PredictConfig, normalize_task
from ftlevel.errors import ConfigError


def predict(given: CommandInput, *, task: str | None, as_json: bool, quiet: bool) -> None:
    """Add predictions to the rows of a file.

    Rows are encoded as in training, need no labels, and keep their order and columns. A prediction
    is a class, classes, a number, tags, a span or a text, depending on the task. Without --output,
    JSONL goes to stdout.
    """
    config = given.section(PredictConfig, task=normalize_task(task) if task else None)
    if as_json and config.output is None:
        raise ConfigError(
            "--json prints what was done on stdout, and without --output the rows go there. Name "
            "a file by --output, or drop --json."
        )
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet, aside=True) as screen:
        with heavy_imports():
            from ftlevel.commands.predict import predict as run

        result = run(config, stream=sys.stdout, listener=screen)
    if as_json:
        typer.echo(json_module.dumps(result.summary, default=str))
        return
    if not quiet:
        for line in _result_lines(result.summary):
            typer.echo(line, err=True)


def _result_lines(summary: Mapping[str, Any]) -> list[str]:
    kept = f"; {summary['kept']:,} were there" if summary["kept"] else ""
    skipped = f"; {summary['skipped']:,} without an answer" if summary["skipped"] else ""
    speed = f", {summary['rows_per_s']:,.1f} rows/s" if summary["rows_per_s"] else ""
    lines = [f"  {summary['rows']:,} rows{kept}{skipped}{speed}"]
    return [*lines, f"  saved {summary['output']}"] if summary["output"] else lines
