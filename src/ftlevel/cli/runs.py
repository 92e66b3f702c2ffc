"""`ftlevel runs`: list runs with their results, and remove their old checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer

from ftlevel.errors import ConfigError


def runs(action: str | None, directory: Path | None, *, yes: bool, as_json: bool) -> None:
    """List runs with their results, or remove their old checkpoints.

    `runs [DIR]` shows task, base, method and result of each run in a directory. `runs clean [DIR]`
    removes checkpoints, but never the last one of a run, nor its best.
    """
    from ftlevel.commands.runs import list_runs

    if action == "clean":
        _clean(directory or Path("runs"), yes=yes, as_json=as_json)
        return
    if directory is not None:
        raise ConfigError(f"unexpected argument {directory}. Use: ftlevel runs DIR, or runs clean.")
    rows = [run.to_dict() for run in list_runs(Path(action or "runs"))]
    if as_json:
        typer.echo(json.dumps({"runs": rows}, ensure_ascii=False))
        return
    cells = [tuple(rows[0]), *(tuple(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        typer.echo("  ".join(padded).rstrip())


def _clean(directory: Path, *, yes: bool, as_json: bool) -> None:
    from ftlevel.commands.runs import list_old_checkpoints, remove_checkpoints

    old = list_old_checkpoints(directory)
    total, count = sum(old.values()), f"{len(old):,} checkpoint{'s' * (len(old) != 1)}"
    if not as_json:
        for checkpoint, size in old.items():
            typer.echo(f"  {checkpoint}  {size / 1e6:,.1f} MB")
    if old and not yes:
        if as_json or not sys.stdin.isatty():
            raise ConfigError(f"{count} would be removed. Add --yes to do so.")
        typer.confirm(f"Remove {count} ({total / 1e6:,.1f} MB)?", abort=True)
    remove_checkpoints(list(old))
    if as_json:
        typer.echo(json.dumps({"removed": list(map(str, old)), "bytes": total}))
    else:
        typer.echo(f"removed {count}, {total / 1e6:,.1f} MB")
