"""`ftlevel list-methods`: supported methods and their combinations."""

from __future__ import annotations

import json as json_module
import shutil
import textwrap
from dataclasses import asdict

import typer

from ftlevel.commands.list_methods import MethodReport
from ftlevel.commands.list_methods import list_methods as describe

_NARROWEST = 80
_COLORS = {"yes": "green", "in part": "yellow", "no": "red"}


def list_methods(model: str | None, task: str | None, quant: str | None, as_json: bool) -> None:
    """List the methods and what they can be combined with.

    "in part" lists the combinations that ftlevel train rejects. --model, --task and --quant filter.
    """
    report = describe(model, task, quant)
    if as_json:
        typer.echo(json_module.dumps(asdict(report), indent=2, ensure_ascii=False))
    else:
        print_report(report)


def print_report(report: MethodReport) -> None:
    """Print a block per method: whether it works, what it trains, and restrictions."""
    width = max(_NARROWEST, shutil.get_terminal_size().columns)
    asked = [report.family, report.task, f"--quant {report.quant}" if report.quant else None]
    typer.secho(", ".join(filter(None, asked)) or "every model, task and base", bold=True)
    typer.echo()
    names = max(len(row.name) for row in report.methods)
    answers = max(len(row.works) for row in report.methods)
    indent = " " * (names + answers + 4)
    for row in report.methods:
        typer.secho(row.name.ljust(names), bold=True, nl=False)
        typer.secho(f"  {row.works.ljust(answers)}", fg=_COLORS[row.works], nl=False)
        lines = [f"{row.trains} ({row.flags})"] if row.works != "no" else []
        for number, line in enumerate([*lines, *row.reasons]):
            text = textwrap.fill(
                line,
                width,
                initial_indent=indent,
                subsequent_indent=indent,
                break_on_hyphens=False,
                break_long_words=False,
            )
            typer.echo(text[len(indent) - 2 :] if number == 0 else text)
