"""What a comparison found: a row a method, the best first, and the command of the winner.

Pictures of a comparison, PNG and SVG: the metric against its costs, and how it came about.
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ftlevel.artifacts.cards import library_versions
from ftlevel.artifacts.ownership import ADAPTER, CONFIG, METRICS, REPORT
from ftlevel.commands.report import report
from ftlevel.config import TrainConfig, TrainerConfig
from ftlevel.evaluation.intervals import Scores, differ, generates_texts, keep_wanted
from ftlevel.tasks import TASKS
from ftlevel.training.plan.best_model import LOWER_IS_BETTER

if TYPE_CHECKING:
    from matplotlib.axes import Axes


SCORES = "scores"


@dataclass(frozen=True)
class ComparisonOptions:
    """What is asked of a comparison beside the run.

    Attributes:
        methods: to compare, by their names or words; none to go on with those of before.
        steps: of each run; None for the epochs of the run.
        minutes: that the steps of each run take; None for no such limit.
        seeds: runs of each method.
        max_memory: GiB that the winner may need.
        max_minutes: that a run of the winner may take.
        search: settings that are searched for each method before it is compared.
        trials: of each search; None for ten.
        study: URL of the database of the searches; None for a file in the directory.
    """

    methods: tuple[str, ...]
    steps: int | None = None
    minutes: float | None = None
    seeds: int = 1
    max_memory: float | None = None
    max_minutes: float | None = None
    search: tuple[str, ...] = ()
    trials: int | None = None
    study: str | None = None


@dataclass
class Comparison:
    """A comparison on its way.

    Attributes:
        path: its directory.
        wishes: what is asked.
        configs: method → its configuration without a directory.
        left_out: method → why it is not compared.
        scored: method → what its runs wrote, by seed.
        dry: method → what a dry run says of it.
        searched: method → what its search found; none without one.
    """

    path: Path
    wishes: ComparisonOptions
    configs: dict[str, TrainConfig] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    scored: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    dry: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    searched: dict[str, dict[str, Any]] = field(default_factory=dict)


def ranking_metric(train: TrainerConfig, task: str, headline: str) -> str:
    """Return the metric that ranks runs: the one asked for, the task's, or else the loss.

    A metric of generated texts ranks nothing where none are generated, or --metrics leaves it out.
    """
    if train.metric_for_best_model is not None:
        return train.metric_for_best_model.removeprefix("eval_")
    generates = generates_texts(train.predict_with_generate, TASKS[task])
    is_missing = headline in TASKS[task].text_metrics and not generates
    is_missing |= headline not in keep_wanted({headline: None}, train.metrics)
    return "loss" if is_missing else headline


def sum_up(found: Comparison, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `--json` prints: the best first."""
    first = next(iter(found.scored.values()))[0]
    greater = next(iter(found.configs.values())).train.greater_is_better
    is_lower_better = (
        not greater if greater is not None else (first["name"].endswith(LOWER_IS_BETTER))
    )
    scores = {
        method: Scores([run["metric"] for run in runs], np.array([run["draws"] for run in runs]))
        for method, runs in found.scored.items()
    }
    order = sorted(scores, key=lambda m: scores[m].mean, reverse=not is_lower_better)
    rows = []
    for method in order:
        apart = differ(scores[method], scores[order[0]], len(order) - 1)
        rows.append({
            **_row(method, found.scored[method], scores[method]),
            "difference": apart.value,
            "difference_interval": apart.interval,
            "difference_error": apart.error,
            "is_noise": apart.is_noise if method != order[0] else None,
            "search": found.searched.get(method),
        })  # fmt: skip
    best = next((row for row in rows if _is_within(row, found.wishes)), None)
    return {
        "rows": rows,
        "best": best and best["method"],
        "command": best and _command(best, found),
        "headline": first["name"],
        "left_out": [{"method": m, "reason": why} for m, why in found.left_out.items()],
        "notes": _notes(found),
        "versions": library_versions(),
        "path": str(found.path),
        "pictures": [],
        **asked,
    }


def _row(method: str, runs: list[dict[str, Any]], scores: Scores) -> dict[str, Any]:
    """Return the figures of a method: means over its seeds, of memory the most."""
    summaries = [run["summary"] for run in runs]
    times = [summary["timings"] for summary in summaries]
    adapter = runs[0]["run"] / ADAPTER
    return {
        "method": method,
        "metric": scores.mean,
        "interval": scores.interval,
        "spread": scores.spread,
        "trained": summaries[0]["trainable_parameters"],
        "adapter_bytes": sum(f.stat().st_size for f in adapter.glob("*.safetensors")),
        "peak_bytes": max(summary["memory"]["peak_bytes"] for summary in summaries),
        "tokens_per_s": statistics.fmean(time["tokens_per_s"] for time in times),
        "seconds": statistics.fmean(time["total_s"] for time in times),
        "steps": summaries[0]["steps"],
        "run": str(runs[0]["run"]),
        "seeds": [{"seed": run["seed"], "metric": run["metric"], "run": str(run["run"])}
                  for run in runs],
    }  # fmt: skip


def _is_within(row: Mapping[str, Any], wishes: ComparisonOptions) -> bool:
    """Whether a method keeps to the limits that were given."""
    memory, minutes = wishes.max_memory, wishes.max_minutes
    is_small = memory is None or row["peak_bytes"] <= memory * 2**30
    return is_small and (minutes is None or row["seconds"] <= 60 * minutes)


def _command(row: Mapping[str, Any], found: Comparison) -> str:
    """Return the command that trains the winner on all rows, for as long as the run says."""
    words = ["ftlevel", "train", f"{row['run']}/{CONFIG}"]
    config = found.configs[row["method"]]
    if found.wishes.steps is not None or found.wishes.minutes is not None:
        words += ["--set", "train.max_steps=null"]
    if config.data.max_samples is not None:
        words += ["--set", "data.max_samples=null"]
    for name, value in found.searched.get(row["method"], {}).get("values", {}).items():
        words += ["--set", f"{name}={value}"]
    return shlex.join(words)


def _notes(found: Comparison) -> list[str]:
    """Return what the reader of the table has to know."""
    notes, runs = [], next(iter(found.scored.values()))
    if len(runs) == 1:
        notes.append("one seed: how far another would move these is not known (--seeds 3)")
    elif len({run["summary"]["data"]["validation_fingerprint"] for run in runs}) > 1:
        notes.append(
            "each seed holds out rows of its own, the same for all methods; a --validation-file is "
            "the same for all seeds"
        )
    if found.searched:
        notes.append(
            "settings were searched on the rows that score them, which flatters all that were: a "
            "test file of other rows tells (ftlevel evaluate)"
        )
    name, headline = runs[0]["name"], runs[0]["summary"]["headline"]
    asked = next(iter(found.configs.values())).train.metric_for_best_model
    if asked is None and name != headline:
        notes.append(f"ranked by {name}: {headline} is not scored (--predict-with-generate)")
    best = {run["summary"]["best"]["metric"] for run in runs if run["summary"].get("best")}
    if asked is not None and (others := best - {f"eval_{name}"}):
        notes.append(f"the runs kept their models with the best {', '.join(sorted(others))}")
    examples = runs[0]["rows"]["examples"]
    notes.append(f"scored on {examples:,} held-out examples; differences are paired row by row")
    return notes


def write_page_of_all(found: Comparison) -> None:
    """Write one page about all runs, anew."""
    page = found.path / REPORT
    page.unlink(missing_ok=True)
    runs = [run for all_runs in found.scored.values() for run in all_runs]
    answers = [found.path / SCORES / f"{run['run'].name}.jsonl" for run in runs]
    report([run["run"] for run in runs], out=page, predictions=answers)


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
