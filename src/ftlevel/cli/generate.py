"""`ftlevel generate`: try what was trained, beside its base if wished."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Optional

import typer


def generate(
    name: Annotated[str, typer.Argument(metavar="RUN|ADAPTER|MODEL", help="What to ask.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to say; repeatable.")],
    context: Annotated[
        Optional[str],  # noqa: UP045 - Typer evaluates it at run time on Python 3.10 as well
        typer.Option("--context", help="The text in which a question's answer is looked for."),
    ] = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="Show the base model's answer beside it.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer in tokens.", show_default=True)
    ] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, nothing else.")
    ] = False,
) -> None:
    """Let a trained run, an adapter or a model answer a prompt.

    The prompt is laid out as in training, by the run's own template, and decoding is greedy. A
    run answers as its task does: with text, a class, the classes above one half, a number, the
    words with their tags, the words for each [MASK], or the span of --context that answers.
    """
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=True) as screen:
        from ftlevel.engine.generate import generate as ask

        answers, notes = ask(
            name,
            prompt,
            context=context,
            compare_base=compare_base,
            max_new_tokens=max_new_tokens,
            device=device,
        )
        for note in notes:
            screen.warn(note)
    if as_json:
        typer.echo(json_module.dumps({"answers": [vars(answer) for answer in answers]}))
        return
    for answer in answers:
        if len(answers) > 1:
            typer.secho(f"» {answer.prompt}", dim=True)
        if answer.base is not None:
            typer.secho("base:  ", fg="yellow", nl=False)
            typer.echo(answer.base)
            typer.secho("tuned: ", fg="green", nl=False)
        typer.echo(answer.text)
        top = sorted(answer.scores.items(), key=lambda item: -item[1])[:3]
        if top:
            typer.secho("  " + ", ".join(f"{label} {p:.1%}" for label, p in top), dim=True)
