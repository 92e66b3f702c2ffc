"""`ftlevel doctor`: report the capabilities of this machine."""

from __future__ import annotations

import json as json_module

import typer

from ftlevel.cli.startup import heavy_imports

_SIGNS = {"good": "ok", "note": "--", "bad": "!!"}


def doctor(*, as_json: bool, quiet: bool) -> None:
    """Check what this machine supports and what to install.

    Exits with 1 if a problem would stop a run. Include the output in bug reports.
    """
    with heavy_imports():
        from ftlevel.commands.doctor import doctor as look
        from ftlevel.commands.doctor import to_dict
        from ftlevel.models.loading import silence_loggers

    with silence_loggers():
        found = look()
    told = to_dict(found)
    if as_json:
        typer.echo(json_module.dumps(told))
    else:
        width = max(len(finding.name) for finding in found)
        for finding in found:
            if quiet and finding.verdict == "good":
                continue
            sign = _SIGNS[finding.verdict]
            typer.echo(f"{sign} {finding.name.ljust(width)}  {finding.value}")
            if finding.advice:
                typer.echo(f"   {' ' * width}  → {finding.advice}")
    if not told["ok"]:
        raise typer.Exit(1)
