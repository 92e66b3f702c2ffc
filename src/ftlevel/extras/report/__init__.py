"""`report`: HTML page about one or several runs; a training run writes one at the end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ftlevel.extensions import Command, Extension

if TYPE_CHECKING:
    from ftlevel.config.flag import Flag


def report(
    runs: Sequence[Path], *, out: Path | None, predictions: Sequence[Path] | None, as_json: bool
) -> None:
    """Write one HTML page about one or several runs.

    The page is self-contained: results, interactive curves, data checks, verification, settings and
    versions. --predictions adds the confusion matrix and the best and worst rows.
    """
    import json

    import typer

    from ftlevel.extras.report.page import report as write

    path = write(runs, out=out, predictions=predictions or ())
    if as_json:
        typer.echo(json.dumps({"page": str(path), "bytes": path.stat().st_size}))
    else:
        typer.echo(f"page: {path}")


def _flags() -> list[Flag]:
    from ftlevel.config.flag import DATA, WRITE, option

    declare = partial(option, on=("report",))
    return [
        declare(
            "RUN...", "Directories of completed runs.", dest="runs", required=True, type=list[Path]
        ),
        declare(
            "--out -o",
            "Path of the page; default: report.html in the run, if there is one run.",
            panel=WRITE,
            type=Path,
            metavar="FILE",
        ),
        declare(
            "--predictions",
            "Output of ftlevel evaluate --predictions (.jsonl); one file per run.",
            panel=DATA,
            type=list[Path],
            metavar="FILE",
        ),
    ]


EXTENSION = Extension(
    commands={
        "report": Command(
            "ftlevel.extras.report:report", "Write one HTML page about one or several runs."
        )
    },
    flags=_flags,
    hooks={"finish_run": "ftlevel.extras.report.page:write_run_page"},
)
