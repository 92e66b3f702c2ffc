"""`ftlevel evaluate` and `predict`: score a model, predict rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import typer

from ftlevel.cli.flags import CommandInput
from ftlevel.cli.startup import heavy_imports
from ftlevel.config import EvaluateConfig, PredictConfig
from ftlevel.errors import ConfigError


def evaluate(inputs: CommandInput, *, predictions: str | None, as_json: bool, quiet: bool) -> None:
    """Evaluate a run, an adapter or a model.

    Reports the task's metrics with 95 % bootstrap intervals. By default, a run is evaluated on its
    own validation rows, which reproduces the metrics of training.
    """
    config = inputs.section(EvaluateConfig)
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet) as screen:
        with heavy_imports():
            from ftlevel.commands.evaluate import evaluate as run

        result = run(config, listener=screen)
    if as_json:
        typer.echo(json.dumps(result.summary, default=str))
        return
    for line in table_lines(result.summary):
        typer.echo(line)
    if predictions:
        typer.echo(f"  predictions {predictions}")


def table_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yields the result as lines: data; per metric, base, tuned model and difference; notes."""
    data, base = summary["data"], summary["base"]
    num_examples = f"{data['examples']:,} examples"
    yield f"  {num_examples} of {data['name']} ({data['split']})"
    width = max(18, *(len(name) + 1 for name in summary["metrics"]))
    for name, value in summary["metrics"].items():
        text = f"  {name:<{width}}"
        if base:
            text += f"{_format_value(base.get(name))} → "
        text += _format_value(value) + _range(summary.get("intervals", {}).get(name))
        delta = summary.get("difference_intervals", {}).get(name)
        if base and name in base and delta:
            text += f"   change {value - base[name]:+.4f}{_range(delta, signed=True)}"
        yield text
    if "against" in summary:
        yield from _format_comparison(summary["against"], summary["metrics"])
    if summary.get("resamples"):
        yield f"  [95 % intervals: {summary['resamples']:,} resamples of the examples]"


def _format_comparison(against: Mapping[str, Any], metrics: Mapping[str, float]) -> Iterator[str]:
    name = against["name"]
    yield f"  compared with {name}"
    width = max((len(metric) for metric in against["metrics"]), default=0)
    for metric, value in against["metrics"].items():
        interval = _range(against.get("intervals", {}).get(metric))
        text = f"    {metric:<{width}} {_format_value(value)}{interval} of {name}"
        if delta := against.get("difference_intervals", {}).get(metric):
            text += f"   difference {metrics[metric] - value:+.4f}{_range(delta, signed=True)}"
        yield text
    rows = against.get("rows")
    if rows is None:
        return
    texts = [f"logits differ by {rows['mean_difference']:.3g} on average"]
    if rows["kl"] is not None:
        texts = [f"KL {rows['kl']:.4f} nats", f"top-1 agreement {rows['top1']:.1%}", *texts]
    yield f"    on {rows['targets']:,} targets of these rows: {', '.join(texts)}"
    if "text" in against:
        text = against["text"]
        yield (
            f"    on {text['positions']:,} positions of {text['name']}: KL {text['kl']:.4f} ± "
            f"{text['kl_standard_error']:.4f} nats, top-1 agreement "
            f"{text['top1_agreement']:.1%}, perplexity {text['perplexity_source']:.3f} → "
            f"{text['perplexity']:.3f}"
        )


def _format_value(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _range(interval: list[float] | None, *, signed: bool = False) -> str:
    if interval is None:
        return ""
    template = "{:+.4f}" if signed else "{:.4f}"
    return " [" + ", ".join(template.format(bound) for bound in interval) + "]"


def predict(inputs: CommandInput, *, as_json: bool, quiet: bool) -> None:
    """Add predictions to the rows of a file.

    Rows are encoded as in training, need no labels, and keep their order and columns. A prediction
    is a class, classes, a number, tags, a span or a text, depending on the task. Without --output,
    rows are printed to stdout as JSONL.
    """
    config = inputs.section(PredictConfig)
    if as_json and config.output is None:
        raise ConfigError(
            "--json prints what was done on stdout, and without --output the rows go there. Pass "
            "--output FILE, or drop --json."
        )
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet, to_stderr=True) as screen:
        with heavy_imports():
            from ftlevel.commands.predict import predict as run

        result = run(config, stream=sys.stdout, listener=screen)
    if as_json:
        typer.echo(json.dumps(result.summary, default=str))
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
