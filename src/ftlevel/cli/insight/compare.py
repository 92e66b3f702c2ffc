"""`ftlevel compare`: several methods on the same model and rows, and what tells them apart."""

from __future__ import annotations

import json as json_module

import typer

from ftlevel.cli.flags import Given, read_config
from ftlevel.cli.startup.apart import prepare
from ftlevel.cli.startup.heavy_imports import heavy_imports


def compare(given: Given, *, as_json: bool, quiet: bool) -> None:
    """Train several methods alike, and say which is best and by how much.

    Takes the flags of train but --method. Each method trains on the same rows with the same budget
    in a process of its own, as train does; a setting of methods goes to those that have it. With
    --resume, runs that are done are kept, and one that was broken off goes on.
    """
    config, _ = read_config(given)
    from ftlevel.cli.screens.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet) as screen:
        with heavy_imports():
            from ftlevel.commands.insight.compare import compare as run
            from ftlevel.commands.insight.comparison import Wishes

        own = given.values
        wishes = Wishes(
            tuple(own["methods"] or ()),
            own["budget_steps"],
            own["budget_minutes"],
            own["seeds"],
            own["max_memory"],
            own["max_minutes"],
            tuple(own["search"] or ()),
            own["trials"],
            own["study"],
        )
        found = run(config, wishes, listener=screen, prepare=prepare)
        if as_json:
            typer.echo(json_module.dumps(found))
        else:
            from ftlevel.cli.screens.compare_screen import show

            show(found, screen.console)
