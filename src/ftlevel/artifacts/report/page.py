"""The page: one HTML file of its own, in which everything from outside is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftlevel._version import __version__
from ftlevel.artifacts.cards import loss_words, memory_words
from ftlevel.artifacts.files import write_text
from ftlevel.artifacts.report.curves import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    draw_charts,
)
from ftlevel.artifacts.report.gather import RunFacts

_LONGEST = 2_000  # letters of an answer that are shown


def write_page(runs: Sequence[RunFacts], path: Path) -> None:
    """Write the page about `runs` to `path`, absent or whole."""
    write_text(path, render_page(runs))


def render_page(runs: Sequence[RunFacts]) -> str:
    """Return the page about `runs`, which are side by side in it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # a run of an earlier version lacks a field
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"words": _words, "texts": _texts, "figures": _figures}
    names = ", ".join(run.name for run in runs)
    page: str = environment.get_template("page.html.jinja").render(
        title=f"{names}: what ftlevel trained",
        version=__version__,
        runs=runs,
        table=list(_table(runs)),
        charts=[_for_template(chart) for chart in draw_charts(runs)],
        has_answers=any(run.answers for run in runs),
        width=WIDTH, height=HEIGHT, left=LEFT, right=RIGHT, top=TOP, bottom=BOTTOM,
    )  # fmt: skip
    return page


_TEXTS = {"input": "asked", "base_predicted": "before", "predicted": "answer", "true": "true",
          "chosen": "preferred", "rejected": "rejected"}  # fmt: skip
"""Fields of a row that was answered, and their headings."""


def _texts(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(title, row[name]) for name, title in _TEXTS.items() if row.get(name) is not None]


def _figures(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what is known of a row in numbers, the loss first, and what it was before."""
    for name in sorted(row, key=lambda name: name != "loss"):
        value, before = row[name], row.get(f"base_{name}")
        if name in ("row", *_TEXTS) or name.startswith("base_"):
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            begun = f"{before:.4g} → " if isinstance(before, int | float) else ""
            yield name.replace("_", " "), f"{begun}{value:.4g}"


def _words(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _for_template(chart: Chart) -> dict[str, Any]:
    data = {
        "lines": [[line.run, [[x, float(f"{y:.6g}")] for x, y in line.points]]
                  for line in chart.lines],
        "span": chart.span,
        "box": [LEFT, WIDTH - RIGHT, WIDTH],
    }  # fmt: skip
    return {
        "title": chart.title, "words": chart.words, "lines": chart.lines,
        "ticks_x": chart.ticks_x, "ticks_y": chart.ticks_y,
        "data": json.dumps(data, separators=(",", ":")),
    }  # fmt: skip


def _table(runs: Sequence[RunFacts]) -> Iterator[tuple[str, list[str]]]:
    """Yield the rows of the table of results: a name, and a value for each run."""
    summaries = [run.summary for run in runs]

    def row(name: str, of: Any) -> tuple[str, list[str]]:
        return name, [of(summary) for summary in summaries]

    yield row("task", lambda s: str(s.get("task", "")))
    yield row("model", lambda s: str(s.get("model", {}).get("name", "")))
    yield row("method", lambda s: str(s.get("method", "")))
    yield row("trained parameters", _trained)
    yield row("steps", lambda s: f"{s.get('steps', 0):,}")
    yield row("training loss", lambda s: loss_words(s) if s.get("loss_first") is not None else "")
    for name in dict.fromkeys(key for s in summaries for key in s.get("metrics", {})):
        yield row(f"validation {name.replace('_', ' ')}", lambda s, key=name: _metric(s, key))
    yield row("seconds", lambda s: f"{s.get('timings', {}).get('total_s', 0):,.1f}")
    yield row("tokens a second", lambda s: f"{s.get('timings', {}).get('tokens_per_s', 0):,.0f}")
    yield row("peak memory", lambda s: _gib(s.get("memory", {}).get("peak_bytes")))
    if any(map(memory_words, summaries)):
        yield row("plan of the memory", memory_words)
    yield row("finished", lambda s: str(s.get("finished", "")))


def _trained(summary: Mapping[str, Any]) -> str:
    trained, total = summary.get("trainable_parameters"), summary.get("total_parameters")
    return f"{trained:,} of {total:,} ({trained / total:.2%})" if trained and total else ""


def _metric(summary: Mapping[str, Any], name: str) -> str:
    """Return a metric, with what it was before the first step and its interval where known."""
    value, before = (summary.get(of, {}).get(name) for of in ("metrics", "metrics_before"))
    if not isinstance(value, int | float):
        return ""
    begun = f"{before:.4f} → " if isinstance(before, int | float) else ""
    ends = summary.get("intervals", {}).get(name)
    return f"{begun}{value:.4f}" + (f" [{ends[0]:.4f}, {ends[1]:.4f}]" if ends else "")


def _gib(size: Any) -> str:
    return f"{size / 2**30:,.2f} GiB" if isinstance(size, int | float) else ""
