"""`ftlevel check-served`: whether a server answers as the model that was trained."""

from __future__ import annotations

import json as json_module

import typer

from ftlevel.cli.flags import Given
from ftlevel.config import CheckServedConfig


def check_served(given: Given, *, as_json: bool, quiet: bool) -> None:
    """Ask a server the recorded prompts, and say whose answers it gives.

    Each is as trained, the base's, or something else. Only the address of --url is asked, some
    dozen times; with --in nothing is asked over a network.
    """
    config = given.section(CheckServedConfig)
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet) as screen:
        from ftlevel.commands.check_served import check_served as run

        result = run(config, listener=screen)
    if as_json:
        typer.echo(json_module.dumps(result.summary, default=str))
    elif not quiet:
        for line in result.lines:
            typer.echo(f"  {line}")
