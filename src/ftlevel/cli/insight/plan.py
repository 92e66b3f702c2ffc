"""`ftlevel plan`: memory, time and disk of a run before it begins, and what else fits."""

from __future__ import annotations

import json as json_module
from functools import partial

import typer

from ftlevel.cli.flags import Given, read_config
from ftlevel.cli.startup.heavy_imports import heavy_imports


def plan(
    given: Given,
    *,
    gpu: str | None,
    probe: bool,
    price_per_hour: float | None,
    brief: bool,
    as_json: bool,
) -> None:
    """Say what a run needs before it begins: memory by part, what fits, time, disk.

    Takes the flags of train and computes its step on tensors that have shapes and no numbers. With
    --model and no --dataset, rows are imagined, as long as --max-length: the model's config is
    enough, its weights are not read. Exit code 0 whether it fits or not.
    """
    config, _ = read_config(given)
    from ftlevel.cli.screens.screen import open_screen

    with open_screen(as_json=as_json, quiet=True) as screen:
        with heavy_imports():
            from ftlevel.commands.insight.plan import Wishes
            from ftlevel.commands.insight.plan import plan as look

        own = given.values
        wishes = Wishes(gpu, probe, price_per_hour, alternatives=not brief, nodes=own["nodes"],
                        gpus_per_node=own["gpus_per_node"],
                        interconnect_gbps=own["interconnect_gbps"])  # fmt: skip
        if as_json:
            typer.echo(json_module.dumps(look(config, wishes).to_dict()))
            return
        from ftlevel.cli.screens.plan_screen import show, show_fits

        found = look(config, wishes, partial(show, console=screen.console),
                     screen.stop_without_reader)  # fmt: skip
        show_fits(found, screen.console)
