"""Render the report as one self-contained HTML file with SVG curves; external text is escaped.

Curves are thinned to about `MAX_POINTS` points and keep minima and maxima. A template draws them,
because a plotting library would add megabytes of script to every page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from shlex import quote
from typing import Any

from ftlevel._version import __version__
from ftlevel.artifacts.cards import describe_losses, format_memory
from ftlevel.artifacts.files import check_new_output, write_text
from ftlevel.artifacts.run_directory import REPORT, RunDirectory
from ftlevel.errors import ConfigError
from ftlevel.extras.report.facts import ReportedRun, create_reported_run, list_dimensions, load_run

Summary = Mapping[str, Any]

_MEANINGS = {
    "accuracy": "share of rows with the right answer",
    "exact_match": "share of rows whose answer equals the correct one",
    "question-answering f1": "overlap of the words of prediction and correct answer, from 0 to 1",
    "f1": "balance of precision and recall, from 0 to 1",
    "macro_f1": "balance of precision and recall, averaged over classes, from 0 to 1",
    "mcc": "correlation of predicted and true classes, from -1 to 1",
    "pearson": "correlation of predicted and true values, from -1 to 1",
    "spearman": "correlation of the ranks of predicted and true values, from -1 to 1",
    "loss": "mean negative log-likelihood of the correct answers; lower is better",
    "perplexity": "as uncertain as between this many equally likely tokens; lower is better",
    "pseudo_perplexity": "as uncertain as between this many equally likely words; lower is better",
    "rougeL": "overlap of generated and correct text, from 0 to 1",
    "bleu": "overlap of generated and correct text, from 0 to 100",
    "chrf": "overlap of characters of generated and correct text, from 0 to 100",
    "ndcg@10": "quality of the first ten search results, from 0 to 1",
    "average_precision": "precision averaged over recall, from 0 to 1",
    "reward": "mean reward of a completion",
    "reward accuracy": "share of pairs whose chosen answer has the higher score",
    "reward_accuracy": "share of pairs whose chosen answer has the higher implicit reward",
    "logp_mean_accuracy": "share of pairs whose chosen answer is more probable per token",
}
"""Metric, or task and metric → its meaning for readers who do not know it."""


def headline(summary: Summary) -> Iterator[str]:
    """Yields a sentence with the main result, and sentences that explain it."""
    data, metrics = summary.get("data", {}), summary.get("metrics", {})
    name, rows = summary.get("headline", "loss"), data.get("validation_rows")
    name = name if name in metrics else "loss"
    if name not in metrics or not rows:
        first, last = summary.get("loss_first"), summary.get("loss_last", 0.0)
        change = f"Training loss {_figure(last)}, at the start {_figure(first)}. " if first else ""
        yield f"{change}No held-out rows: the quality on new rows is not known."
        return
    value, before = metrics[name], summary.get("metrics_before", {}).get(name)
    interval = summary.get("intervals", {}).get(name)
    # Equal ends: all rows have one value.
    interval = interval if interval and interval[0] < interval[1] else None
    new_head = any(choice["name"] == "head learning rate" for choice in summary.get("choices", []))
    start = "before this run" if summary.get("adapter") else "random head" if new_head else "base"
    yield (
        f"{_label(name)} {_figure(value)} on {rows:,} held-out rows"
        + (f", {start} {_figure(before)}" if before is not None else "")
        + (f"; 95 % interval {_figure(interval[0])} to {_figure(interval[1])}" if interval else "")
    )
    if meaning := _MEANINGS.get(f"{summary.get('task')} {name}", _MEANINGS.get(name)):
        yield f"{_label(name)}: {meaning}."
    if interval:
        yield "With many more rows like these, the value would likely lie in the interval."
    if before is None:
        yield "The model was not evaluated before training; --eval-on-start does that."
    elif interval:
        within = interval[0] <= before <= interval[1]
        yield (
            f"The value before training lies {'inside' if within else 'outside'} the interval: "
            + ("the difference may be chance." if within else "a real change is likely.")
        )


def _figure(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 0.1 else f"{value:,.{2 * (abs(value) < 100)}f}"


def data_findings(summary: Summary) -> Iterator[str]:
    """Yields sentences on data problems, and on rows that exceeded the maximum length."""
    data = summary.get("data", {})
    for result in data.get("gate") or ():
        places = ", ".join(result.get("places", ()))
        yield (
            f"{result['title'][:1].upper()}{result['title'][1:]}: {result['count']:,} of "
            f"{result['total']:,} {result['split']} rows ({places}); action: {result['action']}"
        )
    for key, action in (
        ("dropped", "dropped"),
        ("shortened", "shortened to the maximum length"),
        ("validation_dropped", "dropped from validation"),
    ):
        if count := data.get(key):
            yield f"{count:,} rows {action}"


def checks(summary: Summary) -> Iterator[str]:
    """Yields a sentence for each verification, such as of the saved adapter."""
    proof, speed = summary.get("proof", {}), summary.get("speed", {})
    if count := proof.get("gradient_tensors"):
        idle = proof.get("idle_tensors", 0)
        yield (
            f"{count - idle:,} of {count:,} trained tensors received gradients."
            if idle
            else f"Every trained tensor received gradients ({count:,} tensors)."
        )
    if count := proof.get("frozen_tensors"):
        yield f"The {count:,} frozen tensors of the base model did not change, bit for bit."
    if (apart := proof.get("reload_difference")) is not None:
        yield (
            f"The saved files were loaded again and compared on {proof.get('probe_rows')} rows: "
            + (f"outputs differ by at most {apart:.2g}." if apart else "outputs are equal.")
        )
    if (effect := proof.get("adapter_effect")) is not None:
        yield f"Training changed the outputs by up to {effect:.3g}."
    if verified := speed.get("verified"):
        yield (
            f"The fast training step was compared with the plain one on {verified['rows']} rows in "
            f"float32: the loss differs by {verified['loss']:.2g}, gradients by "
            f"{verified['gradient']:.2g} (relative)."
        )
    if reason := speed.get("reason"):
        yield f"The fast training step was disabled: {reason}. The plain step trained."
    if num_skipped := len(summary.get("left_out") or ()):
        yield f"{num_skipped:,} steps were skipped because the loss was not finite or spiked."


_LABELS = {
    "ece": "expected calibration error",
    "length": "length of completions",
    "tokens_right": "correct tokens",
    "truncated": "truncated completions",
}


def _label(metric: str) -> str:
    return _LABELS.get(metric, metric.replace("logp", "log-probability").replace("_", " "))


MAX_POINTS = 400  # per curve
WIDTH, HEIGHT = 640, 264
LEFT, RIGHT, TOP, BOTTOM = 96, 28, 44, 60  # room for labels of the phone's font size

Point = tuple[float, float]

CURVES = (
    ("reward", "Reward of sampled completions", "reward", "reward"),
    ("signal", "Groups with different rewards", "groups_with_signal", "share of groups"),
    ("length", "Length of completions", "completion_length", "tokens"),
    ("truncated", "Truncated completions", "truncated", "share of completions"),
    ("entropy", "Entropy of sampled tokens", "entropy", "nats per token"),
    ("kl", "KL divergence from the initial model", "kl", "nats per token"),
    ("clipped", "Tokens with a clipped loss", "clipped", "share of tokens"),
    ("loss", "Training loss", "loss", "loss"),
    ("eval_loss", "Validation loss", "eval_loss", "loss"),
    ("learning_rate", "Learning rate", "learning_rate", "learning rate"),
    ("grad_norm", "Gradient norm", "grad_norm", "L2 norm"),
    ("tokens_per_s", "Training speed", "", "tokens per second"),
    ("memory", "Memory in use", "memory_bytes", "GiB"),
)
"""Curves: name, heading, field of a log record ("" if computed), and unit."""


@dataclass(frozen=True)
class Line:
    """One run's curve: SVG `path`, (step, value) `points`; `number` determines the color."""

    run: str
    number: int
    path: str
    points: list[Point]
    last: float


@dataclass(frozen=True)
class Chart:
    """A chart; `ticks_*` are (coordinate, label), `span` is (min x, max x, min y, max y)."""

    name: str
    title: str
    unit: str
    lines: list[Line]
    ticks_x: list[tuple[float, str]]
    ticks_y: list[tuple[float, str]]
    span: tuple[float, float, float, float]

    @property
    def words(self) -> str:
        """Text alternative of the chart."""
        texts = [
            f"{line.run}: from {line.points[0][1]:.4g} at step {line.points[0][0]:,.0f} to "
            f"{line.last:.4g} at step {line.points[-1][0]:,.0f}"
            for line in self.lines
        ]
        return f"{self.title} ({self.unit}) by step. {'; '.join(texts)}."

    @property
    def data(self) -> str:
        """JSON of lines, ranges and box, for the script of the page."""
        lines = [[a.run, [[x, float(f"{y:.6g}")] for x, y in a.points]] for a in self.lines]
        data = {"lines": lines, "span": self.span, "box": [LEFT, WIDTH - RIGHT, WIDTH]}
        return json.dumps(data, separators=(",", ":"))


def draw_charts(runs: Sequence[ReportedRun]) -> Iterator[Chart]:
    """Yields a chart for each quantity and evaluation metric that some run has."""
    metrics = dict.fromkeys(
        key
        for run in runs
        for record in run.records
        for key in record
        if key.startswith("eval_") and key != "eval_loss"
    )
    units = {"eval_length": "tokens", "eval_truncated": "share of completions"}
    names = {key: _label(key.removeprefix("eval_")) for key in metrics}
    of_metrics = [(k, f"Validation {name}", k, units.get(k, name)) for k, name in names.items()]
    for name, title, key, unit in (*of_metrics, *CURVES):
        result = [
            (number, run, thin(list(_points(run.records, key)))) for number, run in enumerate(runs)
        ]
        if series := [one for one in result if len(one[2]) > 1]:
            yield _chart(name, title, unit, series)


def _points(records: Sequence[Mapping[str, Any]], key: str) -> Iterator[Point]:
    """Yields finite (step, value) pairs, bytes in GiB; without `key`, tokens/s between records."""
    before: Mapping[str, Any] | None = None
    for record in records:
        step = record.get("step")
        if not isinstance(step, int):
            continue
        if key:
            value = record.get(key)
        elif any(name.startswith("eval_") for name in record):
            continue
        else:
            value, before = _speed(before, record), record
        if isinstance(value, int | float) and math.isfinite(value):
            yield float(step), value / 2**30 if key.endswith("_bytes") else float(value)


def _speed(before: Mapping[str, Any] | None, record: Mapping[str, Any]) -> float | None:
    if before is None or not {"train_s", "tokens"} <= before.keys() & record.keys():
        return None
    seconds = record["train_s"] - before["train_s"]
    return (record["tokens"] - before["tokens"]) / seconds if seconds > 0 else None


def thin(points: list[Point]) -> list[Point]:
    """Returns about `MAX_POINTS` points: the first, lowest and highest of each interval."""
    if len(points) <= MAX_POINTS:
        return points
    stretch = math.ceil(len(points) / (MAX_POINTS // 3))
    thinned: list[Point] = []
    for begin in range(0, len(points), stretch):
        chunk = points[begin : begin + stretch]
        extremes = {chunk[0], min(chunk, key=lambda p: p[1]), max(chunk, key=lambda p: p[1])}
        thinned += sorted(extremes)
    return thinned if thinned[-1] == points[-1] else [*thinned, points[-1]]


def _chart(
    name: str, title: str, unit: str, series: Sequence[tuple[int, ReportedRun, list[Point]]]
) -> Chart:
    all_points = [point for _, _, points in series for point in points]
    low_x, high_x = _span([x for x, _ in all_points])
    low_y, high_y = _span([y for _, y in all_points])

    def to_pixels(point: Point) -> Point:
        across = (point[0] - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        up = (point[1] - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    lines = [
        Line(
            run.name,
            number,
            " ".join(f"{x:.1f},{y:.1f}" for x, y in map(to_pixels, points)),
            points,
            points[-1][1],
        )
        for number, run, points in series
    ]
    steps = [x for x in _ticks(low_x, high_x) if x % 1 == 0]
    ticks_x = [(to_pixels((x, low_y))[0], f"{x:,.0f}") for x in steps]
    at_y = _ticks(low_y, high_y)
    ticks_y = [
        (to_pixels((low_x, y))[1], text) for y, text in zip(at_y, _labels(at_y), strict=True)
    ]
    return Chart(name, title, unit, lines, ticks_x, ticks_y, (low_x, high_x, low_y, high_y))


def _span(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high > low:
        return low, high
    return (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)


def _labels(values: Sequence[float]) -> list[str]:
    """Returns the tick labels of an axis, all in the same notation."""
    texts = [f"{value:.6g}" for value in values]
    if all(len(text) <= 5 or abs(value) >= 0.01 for value, text in zip(values, texts, strict=True)):
        return texts
    parts = [f"{value:.3e}".split("e") for value in values]
    return [f"{float(digits):g}e{int(exp)}" if float(digits) else "0" for digits, exp in parts]


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 4
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * k for k in (1, 2, 2.5, 5, 10) if size * k >= rough)
    first = math.ceil(low / step)
    return [at * step for at in range(first, first + 7) if at * step <= high * (1 + 1e-12)]


_MAX_TEXT = 2_000  # characters printed of an answer


def render_page(runs: Sequence[ReportedRun]) -> str:
    """Returns the HTML report that compares `runs`; runs of equal names are shown by path."""
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(run.path)) for run in runs]
    names = ", ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    page: str = _load_template().render(
        title=f"{names}: training report",
        version=__version__,
        runs=runs,
        results=list(_list_results(runs)),
        facts=list(_list_properties(runs)),
        charts=list(draw_charts(runs)),
        has_answers=any(run.answers and run.answers.is_shown for run in runs),
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=RIGHT,
        top=TOP,
        bottom=BOTTOM,
    )
    return page


@cache
def _load_template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "words": _to_text,
        "texts": _texts,
        "figures": _metric_values,
        "headline": headline,
        "findings": data_findings,
        "checks": checks,
        "dimensions": list_dimensions,
        "quote": quote,
    }
    return environment.get_template("page.html.jinja")


_TEXTS = {
    "input": "input",
    "base_predicted": "prediction before training",
    "predicted": "prediction",
    "true": "correct answer",
    "chosen": "chosen answer",
    "rejected": "rejected answer",
    "query": "query",
    "document": "relevant document",
    "base_retrieved": "best negative before training",
    "retrieved": "best negative",
}
"""Field of an answered row → its heading."""

_TEXTS_WITH_PROMPT = {
    "chosen": "prompt and chosen answer",
    "rejected": "prompt and rejected answer",
}
"""Headings of pairs without a separate prompt."""


def _texts(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns the headings and texts of an answered row; lists such as tags are joined."""
    titles = _TEXTS if "input" in row else _TEXTS | _TEXTS_WITH_PROMPT
    shown = [(title, row[name]) for name, title in titles.items() if row.get(name) is not None]
    texts = [(title, ", ".join(map(str, v)) if isinstance(v, list) else v) for title, v in shown]
    return [(title, "(none)" if text == "" else text) for title, text in texts]


def _metric_values(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in sorted(row, key=lambda name: name != "loss"):
        value, before = row[name], row.get(f"base_{name}")
        if name in ("row", *_TEXTS) or name.startswith("base_"):
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            first = f"{before:.4g}" if isinstance(before, int | float) else ""
            after = f"{value:.4g}"
            yield _label(name), after if first in ("", after) else f"{first} → {after}"


def _to_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"


Row = tuple[str, list[str]]


def _row(runs: Sequence[ReportedRun], name: str, value: Callable[[Any], str]) -> Row:
    return name, [value(run.summary) for run in runs]


def _list_results(runs: Sequence[ReportedRun]) -> Iterator[Row]:
    for name in dict.fromkeys(key for run in runs for key in run.summary.get("metrics", {})):
        yield _row(runs, f"validation {_label(name)}", partial(_metric, name=name))
    yield _row(
        runs,
        "training loss",
        lambda s: describe_losses(s) if s.get("loss_first") is not None else "",
    )
    yield _row(runs, "time", lambda s: f"{s.get('timings', {}).get('total_s', 0):,.1f} s")
    yield _row(
        runs, "speed", lambda s: f"{s.get('timings', {}).get('tokens_per_s', 0):,.0f} tokens/s"
    )
    yield _row(runs, "peak memory", lambda s: _gib(s.get("memory", {}).get("peak_bytes")))
    if any(format_memory(run.summary) for run in runs):
        yield _row(runs, "memory estimate", format_memory)


def _list_properties(runs: Sequence[ReportedRun]) -> Iterator[Row]:
    yield _row(runs, "task", lambda s: str(s.get("task", "")))
    yield _row(runs, "model", lambda s: str(s.get("model", {}).get("name", "")))
    yield _row(runs, "method", lambda s: str(s.get("method", "")))
    yield _row(runs, "trained parameters", _trained)
    yield _row(runs, "steps", lambda s: f"{s.get('steps', 0):,}")
    yield _row(runs, "finished", lambda s: str(s.get("finished", "")).replace("T", " "))


def _trained(summary: Mapping[str, Any]) -> str:
    trained, total = summary.get("trainable_parameters"), summary.get("total_parameters")
    return f"{trained:,} of {total:,} ({trained / total:.2%})" if trained and total else ""


def _metric(summary: Mapping[str, Any], name: str) -> str:
    value, before = (summary.get(of, {}).get(name) for of in ("metrics", "metrics_before"))
    if not isinstance(value, int | float):
        return ""
    text = "{:,.4f}".format if abs(value) < 100 else "{:,.1f}".format
    first = f"{text(before)} → " if isinstance(before, int | float) else ""
    interval = summary.get("intervals", {}).get(name)
    return f"{first}{text(value)}" + (f" [{', '.join(map(text, interval))}]" if interval else "")


def _gib(size: Any) -> str:
    return f"{size / 2**30:,.2f} GiB" if isinstance(size, int | float) else ""


def write_run_page(
    run: RunDirectory, summary: Mapping[str, Any], lines: Sequence[dict[str, Any]]
) -> None:
    """Write the report when a run ends; `lines` are predictions for the validation rows."""
    reported_run = create_reported_run(
        run.path, summary, run.load_log(summary["steps"]), (lambda: lines) if lines else None
    )
    write_text(run.report, render_page([reported_run]))


def report(
    runs: Sequence[Path], *, out: Path | None = None, predictions: Sequence[Path] = ()
) -> Path:
    """Write a report about finished `runs`, and return the path.

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
        check_new_output("--out", out)
    answers: list[Path | None] = [*predictions] or [None for _ in runs]
    result = [load_run(run, rows) for run, rows in zip(runs, answers, strict=True)]
    path = out or runs[0] / REPORT
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render_page(result))
    return path
