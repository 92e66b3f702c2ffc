"""Results of a comparison: ranked rows, the command of the winner, and plots (PNG, SVG)."""

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
from ftlevel.artifacts.run_directory import ADAPTER, CONFIG, METRICS, REPORT
from ftlevel.config import TrainConfig, TrainerConfig
from ftlevel.evaluation.intervals import (
    MetricRuns,
    compute_difference,
    select_metrics,
    should_generate,
)
from ftlevel.extras.report.page import report
from ftlevel.tasks import TASKS
from ftlevel.training.best import is_greater_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes


SCORES = "scores"


@dataclass(frozen=True)
class ComparisonOptions:
    """Options of a comparison besides the run configuration.

    Attributes:
        methods: method names or aliases; empty when resuming.
        steps: optimizer steps per run; None uses the run's epochs.
        minutes: training time per run; None sets no time limit.
        seeds: runs per method.
        max_memory: maximum peak memory of the winner, in GiB.
        max_minutes: maximum time of a run of the winner.
        search: hyperparameters to search for each method.
        trials: trials per search; None means ten.
        study: database URL of the searches; None uses a file in the directory.
    """

    methods: tuple[str, ...]
    steps: int | None
    minutes: float | None
    seeds: int
    max_memory: float | None
    max_minutes: float | None
    search: tuple[str, ...]
    trials: int | None
    study: str | None


@dataclass
class Comparison:
    """State of a comparison; dictionaries are keyed by method.

    Attributes:
        left_out: reason why a method is not compared.
        scored: results of the method's runs, in the order of seeds.
    """

    path: Path
    args: ComparisonOptions
    configs: dict[str, TrainConfig] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    scored: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    dry_runs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    search_results: dict[str, dict[str, Any]] = field(default_factory=dict)


def ranking_metric(train: TrainerConfig, task: str, headline: str) -> str:
    """Returns the requested metric, else `headline`, or the loss if that is not computed."""
    if train.metric_for_best_model is not None:
        return train.metric_for_best_model.removeprefix("eval_")
    generates = should_generate(train.predict_with_generate, TASKS[task])
    is_missing = headline in TASKS[task].text_metrics and not generates
    is_missing |= headline not in select_metrics({headline: None}, train.metrics)
    return "loss" if is_missing else headline


def summarize(result: Comparison, state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the output of `--json`, with methods sorted from best to worst."""
    first = next(iter(result.scored.values()))[0]
    train = next(iter(result.configs.values())).train
    scores = {
        method: MetricRuns(
            [run["metric"] for run in runs], np.array([run["draws"] for run in runs])
        )
        for method, runs in result.scored.items()
    }
    order = sorted(
        scores, key=lambda m: scores[m].mean, reverse=is_greater_better(train, first["name"])
    )
    rows = []
    for method in order:
        apart = compute_difference(scores[method], scores[order[0]], len(order) - 1)
        rows.append(
            {
                **_row(method, result.scored[method], scores[method]),
                "difference": apart.value,
                "difference_interval": apart.interval,
                "difference_error": apart.error,
                "is_noise": apart.is_noise if method != order[0] else None,
                "search": result.search_results.get(method),
            }
        )
    best = next((row for row in rows if _is_within(row, result.args)), None)
    return {
        "rows": rows,
        "best": best and best["method"],
        "command": best and _command(best, result),
        "headline": first["name"],
        "left_out": [{"method": m, "reason": message} for m, message in result.left_out.items()],
        "notes": _notes(result),
        "versions": library_versions(),
        "path": str(result.path),
        "pictures": [],
        **state,
    }


def _row(method: str, runs: list[dict[str, Any]], scores: MetricRuns) -> dict[str, Any]:
    """Returns the table row of `method` from `runs`: means over seeds, and the highest memory."""
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
        "seeds": [
            {"seed": run["seed"], "metric": run["metric"], "run": str(run["run"])} for run in runs
        ],
    }


def _is_within(row: Mapping[str, Any], args: ComparisonOptions) -> bool:
    memory, minutes = args.max_memory, args.max_minutes
    is_small = memory is None or row["peak_bytes"] <= memory * 2**30
    return is_small and (minutes is None or row["seconds"] <= 60 * minutes)


def _command(row: Mapping[str, Any], result: Comparison) -> str:
    """Returns the command that trains the winner on all rows and for all epochs."""
    args = ["ftlevel", "train", f"{row['run']}/{CONFIG}"]
    config, dry_run = result.configs[row["method"]], result.dry_runs[row["method"]]["config"]
    # Limit of the comparison, and what a run chooses for it, such as a rate for few steps.
    resets: list[tuple[str, str, tuple[str, ...]]] = []
    is_limited = result.args.steps is not None or result.args.minutes is not None
    if is_limited:
        resets.append(("train", "max_steps", ("learning_rate", "head_learning_rate")))
    if config.data.max_samples is not None:
        resets.append(("data", "max_samples", ("max_length",)))
    for section, limit, chosen in resets:
        given = getattr(config, section).model_fields_set
        names = [
            name for name in chosen if name not in given and dry_run[section][name] is not None
        ]
        for name in (limit, *names):
            args += ["--set", f"{section}.{name}={'auto' if name == 'max_length' else 'null'}"]
    for name, value in result.search_results.get(row["method"], {}).get("values", {}).items():
        args += ["--set", f"{name}={value}"]
    return shlex.join(args)


def _notes(result: Comparison) -> list[str]:
    notes, runs = [], next(iter(result.scored.values()))
    if len(runs) == 1:
        notes.append("one seed: the variation between seeds is not known (--seeds 3)")
    elif len({run["summary"]["data"]["validation_fingerprint"] for run in runs}) > 1:
        notes.append(
            "each seed holds out its own rows, the same for all methods; a --validation-file is "
            "shared by all seeds"
        )
    if result.search_results:
        notes.append(
            "settings were tuned on the rows that score them, so their metrics are too optimistic; "
            "evaluate on other rows (ftlevel evaluate)"
        )
    name, headline = runs[0]["name"], runs[0]["summary"]["headline"]
    metric = next(iter(result.configs.values())).train.metric_for_best_model
    if metric is None and name != headline:
        notes.append(f"ranked by {name}: {headline} is not scored (--predict-with-generate)")
    best = {run["summary"]["best"]["metric"] for run in runs if run["summary"].get("best")}
    if metric is not None and (others := best - {f"eval_{name}"}):
        notes.append(f"the runs kept their models with the best {', '.join(sorted(others))}")
    examples = runs[0]["rows"]["examples"]
    notes.append(f"scored on {examples:,} held-out examples; differences are paired row by row")
    return notes


def write_comparison_report(result: Comparison) -> None:
    """Write one report about all runs of a comparison; an existing one is replaced."""
    page = result.path / REPORT
    page.unlink(missing_ok=True)
    runs = [run for all_runs in result.scored.values() for run in all_runs]
    predictions = [result.path / SCORES / f"{run['run'].name}.jsonl" for run in runs]
    report([run["run"] for run in runs], out=page, predictions=predictions)


FOLDER = "pictures"
_SIZE, _DOTS = (6.4, 4.0), 150
_KINDS = ("png", "svg")


def draw_pictures(comparison: Comparison, result: Mapping[str, Any]) -> list[str]:
    """Draw plots of `comparison`, whose `--json` output is `result`; returns their paths."""
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
        "loss": lambda axes: _losses(axes, comparison),
    }
    if comparison.search_results:
        pictures["search"] = lambda axes: _history(axes, comparison, metric)
    folder = comparison.path / FOLDER
    folder.mkdir(exist_ok=True)
    paths = []
    for name, draw in pictures.items():
        figure = Figure(_SIZE, layout="constrained")
        draw(figure.subplots())
        for kind in _KINDS:
            path = folder / f"{name}.{kind}"
            figure.savefig(path, dpi=_DOTS)
            paths.append(str(path))
    return paths


def _scatter(
    axes: Axes, rows: Sequence[Mapping[str, Any]], costs: Sequence[float], cost: str, name: str
) -> None:
    """Plot the metric `name` of each method, with its 95 % bootstrap interval, against `costs`."""
    for row, at in zip(rows, costs, strict=True):
        value, interval = row["metric"], row["interval"]
        error_bars = (
            None
            if interval is None
            else [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]
        )
        axes.errorbar([at], [value], yerr=error_bars, fmt="o", capsize=3)
        axes.annotate(_plain(row["method"]), (at, value), xytext=(6, 4), textcoords="offset points")
    axes.set(xlabel=cost, ylabel=name)
    axes.margins(x=0.15)


def _losses(axes: Axes, result: Comparison) -> None:
    for number, (method, runs) in enumerate(result.scored.items()):
        for run in runs:
            lines = (run["run"] / METRICS).read_text(encoding="utf-8").splitlines()
            points = [(r["step"], r["loss"]) for r in map(json.loads, lines) if "loss" in r]
            label = _plain(method) if run is runs[0] else None
            axes.plot(*zip(*points, strict=True), f"C{number}", label=label, alpha=0.8)
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend()


def _history(axes: Axes, result: Comparison, name: str) -> None:
    """Plot the metric `name` of each trial of each search; pruned trials are crosses."""
    for number, (method, search_results) in enumerate(result.search_results.items()):
        for state, mark in (("complete", "o"), ("pruned", "x")):
            trials = [
                t
                for t in search_results["history"]
                if t["state"] == state and t["value"] is not None
            ]
            axes.plot(
                [t["number"] for t in trials],
                [t["value"] for t in trials],
                mark,
                color=f"C{number}",
                label=_plain(method) if state == "complete" else None,
            )
    axes.set(xlabel="trial (× ended early)", ylabel=name)
    axes.legend()


def _plain(text: str) -> str:
    """Escape `$`, which matplotlib would parse as math."""
    return text.replace("$", r"\$")
