"""Pictures of a comparison, PNG and SVG: the metric against its costs, and how it came about."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ftlevel.artifacts.ownership import METRICS
from ftlevel.commands.insight.comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = "pictures"
_SIZE, _DOTS = (6.4, 4.0), 150
_KINDS = ("png", "svg")


def draw_pictures(found: Comparison, result: Mapping[str, Any]) -> list[str]:
    """Draw what was found, and return the paths of the files; none without matplotlib."""
    if not find_spec("matplotlib"):
        return []
    from matplotlib.figure import Figure

    metric, rows = result["headline"].replace("_", " "), result["rows"]
    pictures: dict[str, Callable[[Axes], None]] = {
        "metric-against-memory": lambda axes: _scatter(
            axes, rows, [row["peak_bytes"] / 2**30 for row in rows], "peak memory, GiB", metric
        ),
        "metric-against-time": lambda axes: _scatter(
            axes, rows, [row["seconds"] for row in rows], "time of a run, seconds", metric
        ),
        "loss": lambda axes: _losses(axes, found),
    }
    if found.searched:
        pictures["search"] = lambda axes: _history(axes, found, metric)
    folder = found.path / FOLDER
    folder.mkdir(exist_ok=True)
    written = []
    for name, draw in pictures.items():
        figure = Figure(_SIZE, layout="constrained")
        draw(figure.subplots())
        for kind in _KINDS:
            place = folder / f"{name}.{kind}"
            figure.savefig(place, dpi=_DOTS)
            written.append(str(place))
    return written


def _scatter(
    axes: Axes, rows: Sequence[Mapping[str, Any]], costs: Sequence[float], cost: str, metric: str
) -> None:
    """Draw each method at its cost, with the 95 % interval of its metric over rows."""
    for row, at in zip(rows, costs, strict=True):
        value, ends = row["metric"], row["interval"]
        bars = None if ends is None else [[max(0.0, value - ends[0])], [max(0.0, ends[1] - value)]]
        axes.errorbar([at], [value], yerr=bars, fmt="o", capsize=3)
        axes.annotate(_plain(row["method"]), (at, value), xytext=(6, 4), textcoords="offset points")
    axes.set(xlabel=cost, ylabel=metric)
    axes.margins(x=0.15)


def _losses(axes: Axes, found: Comparison) -> None:
    """Draw the training loss of every run, those of a method in one colour."""
    for number, (method, runs) in enumerate(found.scored.items()):
        for run in runs:
            lines = (run["run"] / METRICS).read_text(encoding="utf-8").splitlines()
            points = [(r["step"], r["loss"]) for r in map(json.loads, lines) if "loss" in r]
            label = _plain(method) if run is runs[0] else None
            axes.plot(*zip(*points, strict=True), f"C{number}", label=label, alpha=0.8)
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend()


def _history(axes: Axes, found: Comparison, metric: str) -> None:
    """Draw what each trial scored, those that were ended early as crosses."""
    for number, (method, searched) in enumerate(found.searched.items()):
        for state, mark in (("complete", "o"), ("pruned", "x")):
            trials = [t for t in searched["history"]
                      if t["state"] == state and t["value"] is not None]  # fmt: skip
            label = _plain(method) if state == "complete" else None
            axes.plot([t["number"] for t in trials], [t["value"] for t in trials], mark,
                      color=f"C{number}", label=label)  # fmt: skip
    axes.set(xlabel="trial (× ended early)", ylabel=metric)
    axes.legend()


def _plain(text: str) -> str:
    """Return `text` without what matplotlib would read as mathematics."""
    return text.replace("$", r"\$")
