"""`ftlevel compare`: train several methods on the same rows and show the results in a table."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator, Mapping
from typing import Any

import typer
from rich.console import Console

from ftlevel.cli.flags import CommandInput, read_config
from ftlevel.cli.preview import format_size
from ftlevel.cli.startup import heavy_imports, prepare
from ftlevel.errors import join_names

_COLUMNS = (
    *("method", "95 % over rows", "± seeds", "to the best", "more than noise"),
    *("trained", "adapter", "peak", "tokens/s", "time"),
)


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the result of `compare`."""
    for line in (*table_lines(result), *closing_lines(result)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def table_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines of the table: names left-aligned, numbers right-aligned."""
    first, *others = _COLUMNS
    others += ["search"] * any(row["search"] for row in result["rows"])
    table = [
        (first, result["headline"], *others),
        *(tuple(_cells(r, result)) for r in result["rows"]),
    ]
    name, *figures = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (text.rjust(width) for text, width in zip(row[1:], figures, strict=True))
        yield "  ".join((row[0].ljust(name), *cells))


def _cells(row: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[str]:
    is_first = row is result["rows"][0]
    yield row["method"]
    yield f"{row['metric']:.4f}"
    yield "–" if row["interval"] is None else "{:.4f} – {:.4f}".format(*row["interval"])
    yield "?" if row["spread"] is None else f"{row['spread']:.4f}"
    yield "" if is_first else f"{row['difference']:+.4f}"
    answer = {None: "?", True: "no", False: "yes"}[row["is_noise"]]
    yield "" if is_first else answer
    yield f"{row['trained']:,}"
    yield format_size(row["adapter_bytes"])
    yield format_size(row["peak_bytes"])
    yield f"{row['tokens_per_s']:,.0f}"
    yield f"{row['seconds']:,.1f} s"
    if any(other["search"] for other in result["rows"]):
        yield f"{row['search']['seconds']:,.1f} s" if row["search"] else ""


def closing_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines printed after the table."""
    for line in result["notes"]:
        yield f"note: {line}"
    for entry in result["left_out"]:
        yield f"not compared: {entry['method']}: {entry['reason']}"
    for row in result["rows"]:
        if search_results := row["search"]:
            yield f"searched for {row['method']}: {_search_words(search_results)}"
    yield "versions: " + ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    if not result["pictures"]:
        yield 'pictures need matplotlib: pip install "ftlevel[plots]"'
    files = "compare.json, report.html, " + "pictures, " * bool(result["pictures"])
    yield f"saved: {result['path']}: {files}and a run directory for each"
    if result["best"] is None:
        yield "no method is within the limits that were given."
    else:
        value = next(row["metric"] for row in result["rows"] if row["method"] == result["best"])
        equal = [row["method"] for row in result["rows"] if row["metric"] == value]
        others = [method for method in equal if method != result["best"]]
        tie = f", as good as {join_names(others)}" if others else ""
        yield f"best: {result['best']}{tie}. Command to train it:"
        yield f"  {result['command']}"


def _search_words(search_results: Mapping[str, Any]) -> str:
    values = ", ".join(f"{name} {value:.4g}" for name, value in search_results["values"].items())
    return (
        f"{values} ({search_results['trials']} trials, {search_results['pruned']} of them ended "
        f"early, {search_results['seconds']:,.1f} s)"
    )


def compare(inputs: CommandInput, *, as_json: bool, quiet: bool) -> None:
    """Compare several methods on the same data and budget.

    Accepts the flags of train except --method. Each method trains in its own process; a method
    setting applies to all methods that have it. --resume skips completed runs.
    """
    config, _ = read_config(inputs)
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet) as screen:
        with heavy_imports():
            from ftlevel.extras.compare.compare import compare as run
            from ftlevel.extras.compare.comparison import ComparisonOptions

        args = ComparisonOptions(
            tuple(inputs.values["methods"] or ()),
            inputs.values["budget_steps"],
            inputs.values["budget_minutes"],
            inputs.values["seeds"],
            inputs.values["max_memory"],
            inputs.values["max_minutes"],
            tuple(inputs.values["search"] or ()),
            inputs.values["trials"],
            inputs.values["study"],
        )
        result = run(config, args, listener=screen, prepare=prepare)
        if as_json:
            typer.echo(json_module.dumps(result))
        else:
            show(result, screen.console)
