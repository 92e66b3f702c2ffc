"""`ftlevel init`: create a recipe interactively."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ftlevel.cli.flags import CommandInput, add_flag_layers, print_note
from ftlevel.cli.spelling import validate_no_ops
from ftlevel.cli.startup import heavy_imports
from ftlevel.errors import ConfigError

if TYPE_CHECKING:
    from ftlevel.commands.init import SetupQuestion
    from ftlevel.config.section import Choice


def init(inputs: CommandInput, *, file: Path, yes: bool, as_json: bool) -> None:
    """Create a commented recipe from five questions.

    Asks for data, task, model, method and epochs unless given by flags of train. Suggestions come
    from the data; --yes accepts them. The recipe is validated before it is written, and no file is
    overwritten.
    """
    _check_free(file)
    layers = add_flag_layers([], inputs, print_note)
    if not (yes or as_json or sys.stdin.isatty()):
        raise ConfigError(
            "there is no terminal for questions. Add --yes to accept the suggestions, or flags "
            "of train."
        )
    with heavy_imports():
        from ftlevel.commands.init import check_value, draft

    def ask(question: SetupQuestion, proposal: Choice) -> str:
        if yes or as_json:
            return str(proposal.value)
        typer.echo(f"{proposal.value}: {proposal.reason}")
        while True:
            value: str = typer.prompt(question.prompt, default=str(proposal.value))
            try:
                check_value(layers, question, value.strip())
            except ConfigError as error:
                typer.echo(f"  {error}", err=True)
            else:
                return value.strip()

    drafted = draft(layers, file, ask)
    for line in validate_no_ops(inputs.no_ops, drafted.config):
        print_note(line)
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(drafted.text)
    except FileExistsError:
        _check_free(file)
    except FileNotFoundError:
        raise ConfigError(f"{file.parent} does not exist. Create the directory first.") from None
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "recipe": str(file),
                    "config": drafted.config.model_dump(mode="json", exclude_unset=True),
                    "proposed": [
                        {"name": c.name, "value": c.value, "reason": c.reason}
                        for c in drafted.defaults
                    ],
                    "steps": drafted.steps,
                    "command": drafted.command,
                }
            )
        )
        return
    for choice in drafted.defaults if yes else ():
        typer.echo(f"{choice.name}: {choice}")
    typer.echo(f"wrote {file}. Then: {drafted.command}")


def _check_free(file: Path) -> None:
    if file.exists() or file.is_symlink():
        raise ConfigError(
            f"{file} already exists and is not changed. Choose another: "
            f"ftlevel init {file.with_stem(file.stem + '-2')}"
        )
