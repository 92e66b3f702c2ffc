"""`ftlevel train`: build the configuration from recipe and flags, and train."""

from __future__ import annotations

import json as json_module

import typer

from ftlevel.cli.flags import CommandInput, read_config
from ftlevel.cli.processes import end_with_parent, launch
from ftlevel.cli.startup import heavy_imports, share_heaps
from ftlevel.config import TrainConfig
from ftlevel.world import has_agent, is_follower, is_launched


def train(given: CommandInput, *, dry_run: bool, as_json: bool, quiet: bool, schema: bool) -> None:
    """Fine-tune a model on a dataset.

    Without --model and --dataset, trains the built-in model on built-in examples. --set
    section.key=value sets any other field; --schema lists all fields.
    """
    if schema:
        typer.echo(json_module.dumps(TrainConfig.model_json_schema(), indent=2))
        return
    config, origin = read_config(given)
    processes = config.train.num_processes or 1
    if processes > 1 and not dry_run and not is_launched():
        raise typer.Exit(launch(given.arguments, processes, config.train.max_restarts))
    if has_agent():
        end_with_parent()
    follows = is_follower()
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet or follows) as screen:
        share_heaps()
        with heavy_imports():
            from ftlevel.commands.train import train as run
            from ftlevel.training.finish import StartTime
            from ftlevel.training.job import CommandLine

        asked = CommandLine(origin, StartTime.of_process())
        result = run(config, listener=screen, dry_run=dry_run, command_line=asked)
    if as_json and not follows:
        typer.echo(json_module.dumps(result.summary, default=str))
