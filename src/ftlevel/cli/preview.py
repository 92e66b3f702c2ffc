"""`ftlevel preview`: the data as the model will see it, before anything is trained."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Optional

import typer

from ftlevel.cli.flags import flag, read_config
from ftlevel.cli.heavy_imports import uncollected_imports

# Optional[...] instead of `| None`: Typer evaluates these at run time on Python 3.10 as well.
Text = Optional[str]  # noqa: UP045
Int = Optional[int]  # noqa: UP045
Float = Optional[float]  # noqa: UP045


def preview(
    context: typer.Context,
    recipe_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(metavar="[RECIPE|RUN]", help="A recipe, or the directory of a run."),
    ] = None,
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--recipe", help="A recipe; flags win over it."),
    ] = None,
    model: Annotated[Text, flag("model.name_or_path", "--model")] = None,
    dataset: Annotated[
        Optional[list[str]],  # noqa: UP045
        flag("data.dataset", "--dataset"),
    ] = None,
    mix: Annotated[Text, flag("data.mix", "--mix")] = None,
    split: Annotated[Text, flag("data.split")] = None,
    task: Annotated[Text, flag("task", "--task")] = None,
    format: Annotated[Text, flag("data.format", "--format")] = None,
    chat_template: Annotated[Text, flag("data.chat_template")] = None,
    max_length: Annotated[Text, flag("data.max_length", "--max-length")] = None,
    overlong: Annotated[Text, flag("data.overlong")] = None,
    streaming: Annotated[
        Optional[bool],  # noqa: UP045
        flag("data.streaming", "--streaming/--no-streaming"),
    ] = None,
    max_steps: Annotated[
        Optional[int],  # noqa: UP045
        flag("train.max_steps", "--max-steps"),
    ] = None,
    validation_split: Annotated[Float, flag("data.validation_split")] = None,
    max_samples: Annotated[Int, flag("data.max_samples", "--max-samples")] = None,
    column_map: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--map", metavar="NAME=COLUMN", help="What the data calls a column."),
    ] = None,
    cache: Annotated[
        Optional[bool],  # noqa: UP045
        flag("data.cache", "--cache/--no-cache"),
    ] = None,
    on_bad_row: Annotated[Text, flag("data.on_bad_row")] = None,
    num_train_epochs: Annotated[Float, flag("train.num_train_epochs", "--num-train-epochs")] = None,
    per_device_train_batch_size: Annotated[Int, flag("train.per_device_train_batch_size")] = None,
    gradient_accumulation_steps: Annotated[Int, flag("train.gradient_accumulation_steps")] = None,
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="Set any field; repeatable."),
    ] = None,
    row: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option("--row", metavar="N", min=1, help="Show row N, from 1; repeatable."),
    ] = None,
    html: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--html", metavar="FILE", help="Write one page that needs nothing else."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, nothing else.")
    ] = False,
) -> None:
    """Show rows as the model will see them, and what is wrong with the data.

    Reads the data with the model's tokenizer exactly as train does, by the same flags, and loads no
    weights. What the model learns is green in a terminal and in [brackets] in a pipe. Then come the
    lengths, the share that is learned, the tokens of an epoch, the steps, and what the gate found.
    """
    config, _ = read_config(context.params)
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=True) as screen:
        with uncollected_imports():
            from ftlevel.commands.preview import preview as look

        found = look(config, row or ())
        if html is not None:
            from ftlevel.cli.preview_page import write_page

            write_page(found, html)
        if as_json:
            typer.echo(json_module.dumps(found.to_dict()))
            return
        from ftlevel.cli.preview_screen import show

        show(found, screen.console, whole=bool(row))
        if html is not None:
            typer.echo(f"page: {html}")
