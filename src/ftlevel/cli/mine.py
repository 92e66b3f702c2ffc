"""`ftlevel mine`: find hard negatives."""

from __future__ import annotations

import json

import typer

from ftlevel.cli.flags import CommandInput
from ftlevel.cli.startup import heavy_imports
from ftlevel.config.mining import MineConfig


def mine(given: CommandInput, *, as_json: bool, quiet: bool) -> None:
    """Add hard negatives to queries with positives.

    An embedding model searches the documents of all rows, and of --corpus, for those nearest to
    each query. The output has columns query, pos and neg, and is data for --task embedding and
    --task reranking.
    """
    config = given.section(MineConfig)
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet) as screen:
        with heavy_imports():
            from ftlevel.commands.mine import mine as run

        summary = run(config, listener=screen)
    if as_json:
        typer.echo(json.dumps(summary, default=str))
        return
    mean = summary["negatives"] / summary["rows"]
    typer.echo(f"  {summary['rows']:,} rows with {mean:.1f} negatives each")
    if summary["left_out"]:
        typer.echo(f"  {summary['left_out']:,} rows without a negative are skipped")
    typer.echo(f"  saved {summary['output']}")
