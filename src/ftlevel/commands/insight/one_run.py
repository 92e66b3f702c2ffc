"""One run of a comparison, in a process of its own: train as `train` does, then score each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftlevel.artifacts.files import write_json
from ftlevel.commands.evaluate import evaluate
from ftlevel.commands.insight.comparison import ranking_metric
from ftlevel.commands.insight.own_process import StopWithParent
from ftlevel.commands.insight.plan import Wishes, plan
from ftlevel.commands.train import CommandLine, train
from ftlevel.config import EvaluateConfig, TrainConfig, build_section
from ftlevel.errors import ConfigError
from ftlevel.events import Silence
from ftlevel.training.finish import Start

RESAMPLES = 1000
"""Draws of the rows, the same for all that are scored on as many."""


def train_and_score(config: TrainConfig, place: Path) -> None:
    """Train `config` into its own run directory and write what became of its rows to `place`.

    Args:
        config: of the run, with a directory; it goes on where that has begun.
        place: `NAME.json`, written last; the rows' answers are beside it as `NAME.jsonl`.

    Raises:
        FtlevelError: as `train` and `evaluate` do.
    """
    begun = CommandLine(None, Start.now())
    result = train(config, callbacks=[StopWithParent()], listener=Silence(), command_line=begun)
    answers = place.with_suffix(".jsonl")
    answers.unlink(missing_ok=True)
    values = {"name": str(result.path), "base": False, "resamples": RESAMPLES,
              "predictions": answers}  # fmt: skip
    found = evaluate(build_section(EvaluateConfig, values), listener=Silence())
    metric = ranking_metric(config.train, found.summary["task"], found.summary["headline"])
    if metric not in found.metrics:
        raise ConfigError(f"it has no {metric}: {', '.join(found.metrics)}")
    drawn = found.draws.get(metric)
    write_json(place, {
        "name": metric,
        "metric": found.metrics[metric],
        "metrics": found.metrics,
        "rows": found.summary["data"],
        "draws": [] if drawn is None else drawn.tolist(),
    })  # fmt: skip


def seconds_per_step(config: TrainConfig) -> float:
    """Return how long a step of `config` takes here, by a few of them."""
    found = plan(config, Wishes(probe=True, alternatives=False))
    if found.time is None:
        raise ConfigError("its steps could not be timed")
    return found.time.seconds_per_epoch / found.steps


def describe_run(config: TrainConfig) -> dict[str, Any]:
    """Return what `train --dry-run` finds out, and so refuse what cannot be trained."""
    return dict(train(config, dry_run=True, listener=Silence()).summary)
