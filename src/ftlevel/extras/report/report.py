"""`report`: write a self-contained HTML page about one or more runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ftlevel.artifacts.files import check_absent
from ftlevel.artifacts.ownership import REPORT
from ftlevel.errors import ConfigError
from ftlevel.extras.report.facts import read_run_facts
from ftlevel.extras.report.page import write_page


def report(
    runs: Sequence[Path], *, out: Path | None = None, predictions: Sequence[Path] = ()
) -> Path:
    """Write a page about finished `runs`, and return its path.

    Without `out`, `report.html` of the only run is replaced. `predictions` are files written by
    `ftlevel evaluate --predictions`, one per run.

    Raises:
        ConfigError: no output path, or the number of predictions does not match.
        InputError: a run cannot be read.
    """
    if predictions and len(predictions) != len(runs):
        raise ConfigError(
            f"{len(predictions)} --predictions for {len(runs)} runs. Give one for each run, in "
            "their order."
        )
    if out is None and len(runs) > 1:
        raise ConfigError(f"{len(runs)} runs have no common directory. Add --out report.html")
    if out is not None:
        check_absent("--out", out)
    answers: list[Path | None] = [*predictions] or [None for _ in runs]
    found = [read_run_facts(run, rows) for run, rows in zip(runs, answers, strict=True)]
    place = out or runs[0] / REPORT
    place.parent.mkdir(parents=True, exist_ok=True)
    write_page(found, place)
    return place
