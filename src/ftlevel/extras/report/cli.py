"""`ftlevel report`: write an HTML page on one or several runs."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path

import typer


def report(
    runs: Sequence[Path], *, out: Path | None, predictions: Sequence[Path] | None, as_json: bool
) -> None:
    """Write one HTML page about one or several runs.

    The page is self-contained: results, interactive curves, data checks, verification, settings and
    versions. --predictions adds the confusion matrix and the best and worst rows.
    """
    from ftlevel.extras.report.report import report as write

    place = write(runs, out=out, predictions=predictions or ())
    if as_json:
        typer.echo(json_module.dumps({"page": str(place), "bytes": place.stat().st_size}))
    else:
        typer.echo(f"page: {place}")
