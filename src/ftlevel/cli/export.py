"""`ftlevel export`: convert a run, an adapter or a model for a server."""

from __future__ import annotations

import json as json_module

import typer

from ftlevel.cli.flags import CommandInput
from ftlevel.config import ExportConfig


def export(
    given: CommandInput, *, out: str | None, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """Export a run, an adapter or a model for a server.

    --for SERVER selects the format and rejects what that server would load incorrectly. The files
    are read back and compared with the model before they are moved into place.
    """
    nowhere = {"out": "model.gguf", "overwrite": True} if dry_run and out is None else {}
    config = given.section(ExportConfig, **nowhere)
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet) as screen:
        from ftlevel.commands.export import export as run

        result = run(config, listener=screen, dry_run=dry_run)
    if as_json:
        typer.echo(json_module.dumps(result.summary, default=str))
    elif not quiet:
        for line in result.lines:
            typer.echo(f"  {line}")
        if "hub" in result.summary:
            typer.echo(f"  uploaded {result.summary['hub']}")
