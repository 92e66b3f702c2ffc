"""`ftlevel list-targets`, `list-methods` and `doctor`: describe models, methods and the machine."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from ftlevel.cli.startup import echo_styled, heavy_imports
from ftlevel.safe_io import escape_json

if TYPE_CHECKING:
    from ftlevel.commands.list_methods import MethodReport
    from ftlevel.commands.list_targets import LoraSize, TargetReport, TargetRow

_NARROWEST = 80
_GAP = "  "


def list_targets(model: str, lora_r: int, as_json: bool) -> None:
    """List the modules of a model or a family that can be adapted.

    For a model, it reads the config without the weights and shows shapes, counts and LoRA
    parameters.
    """
    from ftlevel.commands.list_targets import list_targets as describe_targets

    report = describe_targets(model, lora_r)
    if as_json:
        typer.echo(escape_json(json.dumps(asdict(report), indent=2, ensure_ascii=False)))
    else:
        _print_targets(report)


def _print_targets(report: TargetReport) -> None:
    width = max(_NARROWEST, shutil.get_terminal_size().columns)
    parts = [report.name, report.kind]
    if report.source == "model":
        parts[1:1] = [report.family, *report.heads]
    if report.total_parameters is not None:
        parts.append(f"{report.total_parameters:,} parameters")
    echo_styled(", ".join(parts), bold=True)
    typer.echo()
    title, cells = _cells(report)
    every = [title, *(row for row in cells if len(row) > 1)]
    widths = [max(len(row[column]) for row in every) for column in range(len(title))]
    echo_styled(_join(title, widths), bold=True)
    echo_styled("-" * (sum(widths) + len(_GAP) * (len(widths) - 1)), bold=False)
    for row in cells:
        is_heading = len(row) == 1
        echo_styled(row[0] if is_heading else _join(row, widths), bold=is_heading)
    for text, number in _footnotes(report).items():
        typer.echo(f"({number}) only: {text}")
    typer.echo()
    for label, text in _facts(report):
        typer.echo(_fact_lines(label, text, width))


def _join(row: Sequence[str], widths: Sequence[int]) -> str:
    figures = range(3, len(row) - 1)
    parts = [
        cell.rjust(width) if column in figures else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return _GAP.join(parts).rstrip()


def _cells(report: TargetReport) -> tuple[list[str], list[list[str]]]:
    """Returns the header row and the other rows; a row with one cell is the heading of a block."""
    counted = report.source == "model"
    numbers = ["Count", f"LoRA r={report.lora.r}"] if counted and report.lora else []
    notes = _footnotes(report)
    cells: list[list[str]] = []
    block = None
    rows = (*report.linears, *report.experts)
    order = list(dict.fromkeys(row.block for row in rows))
    for row in sorted(rows, key=lambda row: order.index(row.block)):
        if row.block != block:
            block = row.block
            cells.append([block or "outside the blocks"])
        figures = [f"{row.count:,}", f"{row.lora_parameters:,}"] if numbers else []
        cells.append([f"  {row.path}", row.type, row.shape, *figures, _default_cell(row, notes)])
    return ["Linear", "Type", "in -> out", *numbers, "Default"], cells


def _footnotes(report: TargetReport) -> dict[str, int]:
    texts = dict.fromkeys(row.only for row in report.linears if row.only)
    return {text: number for number, text in enumerate(texts, start=1)}


def _default_cell(row: TargetRow, notes: dict[str, int]) -> str:
    cell = "yes" if row.default else "-"
    return f"{cell} ({notes[row.only]})" if row.only else cell


def _fact_lines(label: str, text: str, width: int) -> str:
    """Wrap `text`, after `label`, to `width` columns; line breaks in the text are kept."""
    indent = " " * 12
    lines = [
        wrapped
        for line in text.split("\n")
        for wrapped in textwrap.wrap(
            line, width - len(indent), break_on_hyphens=False, break_long_words=False
        )
    ]
    return f"{label:<12}" + f"\n{indent}".join(lines)


def _facts(report: TargetReport) -> list[tuple[str, str]]:
    rows = [("all-linear", f"{', '.join(report.all_linear)} (the default)")]
    if report.attention_only:
        rows.append(("attention", f"{', '.join(report.attention_only)} (for --target-modules)"))
    if report.target_parameters:
        rows.append(("experts", f"target_parameters: {', '.join(report.target_parameters)}"))
    heads = [f"{task}: {', '.join(names)}" for task, names in report.heads.items() if names]
    rows.append(("heads", "\n".join(heads) or "none"))
    rows.append(("", "Heads are never adapted; a task's new head is trained in full and saved."))
    rows.append(("norms", _group_by_parent(report.norms) or "none with weights"))
    rows.append(("embeddings", _group_by_parent(report.embeddings)))
    if report.aliases:
        rows.append(("same names", ", ".join(report.aliases)))
    if report.note:
        rows.append(("note", report.note))
    if report.lora:
        rows.append((f"LoRA r={report.lora.r}", _lora_text(report.lora)))
    else:
        rows.append(("LoRA", "r * (in + out) parameters per linear layer."))
    return rows


def _group_by_parent(patterns: Sequence[str]) -> str:
    """Returns module names, a line per parent, such as `model.layers.{i}: input_layernorm, …`."""
    from ftlevel.commands.list_targets import split_pattern

    lines: dict[str, list[str]] = {}
    for pattern in patterns:
        block, inside = split_pattern(pattern)
        lines.setdefault(block, []).append(inside)
    return "\n".join(
        (f"{block}: " if block else "") + ", ".join(names) for block, names in lines.items()
    )


def _lora_text(lora: LoraSize) -> str:
    share = f", {lora.share:.2%} of the model" if lora.share is not None else ""
    return (
        f"r * (in + out) parameters per linear layer. {lora.of}, all-linear: "
        f"{lora.trainable_parameters:,} trainable{share}; {_size(lora.adapter_bytes)} in float32."
    )


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


_COLORS = {"yes": "green", "in part": "yellow", "no": "red"}


def list_methods(model: str | None, task: str | None, quant: str | None, as_json: bool) -> None:
    """List the methods and what they can be combined with.

    Methods marked "in part" are followed by their unsupported combinations. --model, --task and
    --quant filter the list.
    """
    from ftlevel.commands.list_methods import list_methods as describe_methods

    report = describe_methods(model, task, quant)
    if as_json:
        typer.echo(escape_json(json.dumps(asdict(report), indent=2, ensure_ascii=False)))
    else:
        _print_methods(report)


def _print_methods(report: MethodReport) -> None:
    width = max(_NARROWEST, shutil.get_terminal_size().columns)
    filters = [report.family, report.task, f"--quant {report.quant}" if report.quant else None]
    echo_styled(", ".join(filter(None, filters)) or "every model, task and base", bold=True)
    typer.echo()
    names = max(len(row.name) for row in report.methods)
    answers = max(len(row.works) for row in report.methods)
    indent = " " * (names + answers + 4)
    for row in report.methods:
        echo_styled(row.name.ljust(names), bold=True, nl=False)
        echo_styled(f"  {row.works.ljust(answers)}", fg=_COLORS[row.works], nl=False)
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


_SIGNS = {"good": "ok", "note": "--", "bad": "!!"}


def doctor(*, as_json: bool, quiet: bool) -> None:
    """Check what this machine supports and what to install.

    Exits with 1 if a problem would stop a run. Include the output in bug reports.
    """
    with heavy_imports():
        from ftlevel.commands.doctor import run_checks, to_dict
        from ftlevel.models.loading import silence_loggers

    with silence_loggers():
        results = run_checks()
    report = to_dict(results)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        width = max(len(result.name) for result in results)
        for result in results:
            if quiet and result.verdict == "good":
                continue
            typer.echo(f"{_SIGNS[result.verdict]} {result.name.ljust(width)}  {result.value}")
            if result.advice:
                typer.echo(f"   {' ' * width}  → {result.advice}")
    if not report["ok"]:
        raise typer.Exit(1)
