"""`ftlevel check-served`: compare a server's outputs with those of the trained model."""

from __future__ import annotations

import json as json_module

import typer

from ftlevel.cli.flags import CommandInput
from ftlevel.extras.serving.config import CheckServedConfig


def check_served(given: CommandInput, *, as_json: bool, quiet: bool) -> None:
    """Check that a server returns the trained adapter's outputs.

    Each answer is the trained model's, the base model's, or neither. Sends about a dozen requests,
    to --url only; --in uses no network.
    """
    config = given.section(CheckServedConfig)
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet) as screen:
        from ftlevel.extras.serving.check import check_served as run

        result = run(config, listener=screen)
    if as_json:
        typer.echo(json_module.dumps(result.summary, default=str))
    elif not quiet:
        for line in result.lines:
            typer.echo(f"  {line}")
