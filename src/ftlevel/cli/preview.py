"""`ftlevel preview`: the data as the model will see it, before anything is trained."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path

import typer

from ftlevel.cli.flags import Given, read_config
from ftlevel.cli.startup.heavy_imports import heavy_imports


def preview(given: Given, *, row: Sequence[int] | None, html: Path | None, as_json: bool) -> None:
    """Show rows as the model will see them, and what is wrong with the data.

    Reads the data with the model's tokenizer exactly as train does, by the same flags, and loads no
    weights. What the model learns is green in a terminal and in [brackets] in a pipe. Then come the
    lengths, the share that is learned, the tokens of an epoch, the steps, and what the gate found.
    """
    config, _ = read_config(given)
    from ftlevel.cli.screens.screen import open_screen

    with open_screen(as_json=as_json, quiet=True) as screen:
        with heavy_imports():
            from ftlevel.commands.preview import preview as look

        found = look(config, row or ())
        if html is not None:
            from ftlevel.cli.screens.preview_page import write_page

            write_page(found, html)
        if as_json:
            typer.echo(json_module.dumps(found.to_dict()))
            return
        from ftlevel.cli.screens.preview_screen import show

        show(found, screen.console, whole=bool(row))
        if html is not None:
            typer.echo(f"page: {html}")
