"""`ftlevel report`: one page about a run, or several side by side."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path

import typer


def report(
    runs: Sequence[Path], *, out: Path | None, predictions: Sequence[Path] | None, as_json: bool
) -> None:
    """Write one HTML page about a run, or several side by side.

    It needs no network and nothing beside it: results, curves with the value under the pointer,
    what the checks of the data found, the proof, settings and versions. With --predictions, of
    `ftlevel evaluate --predictions FILE`, it has the confusion matrix and the best and worst rows.
    """
    from ftlevel.commands.report import report as write

    place = write(runs, out=out, predictions=predictions or ())
    if as_json:
        typer.echo(json_module.dumps({"page": str(place), "bytes": place.stat().st_size}))
    else:
        typer.echo(f"page: {place}")
