"""`ftlevel generate`: try what was trained, beside its base if wished."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ftlevel.cli.flags import Given
from ftlevel.cli.startup.heavy_imports import heavy_imports
from ftlevel.config import GenerateConfig, normal_task
from ftlevel.errors import ConfigError


def generate(
    given: Given,
    *,
    prompt: list[str] | None,
    prompts: Path | None,
    out: Path | None,
    chat: bool,
    as_json: bool,
) -> None:
    """Let a trained run, an adapter or a model answer a prompt.

    The prompt is laid out as in training, by the run's own template, and decoding is greedy unless
    --temperature is given. A run answers as its task does: with text, a class, the classes above
    one half, a number, the words with their tags, the words for each [MASK], or the span of
    --context that answers.
    """
    config = _read_config(given)
    if chat:
        if prompt or prompts or out or as_json:
            raise ConfigError(
                "--chat asks in the terminal. Drop --prompt, --prompts, --out, --json."
            )
        from ftlevel.cli.chat import talk

        talk(config)
        return
    if not (prompt or prompts):
        raise ConfigError("there is nothing to ask. Add --prompt TEXT, --prompts FILE or --chat.")
    from ftlevel.cli.screens.screen import open_screen

    with open_screen(as_json=as_json, quiet=True) as screen:
        from ftlevel.artifacts.files import check_absent, placed_files

        with heavy_imports():
            from ftlevel.commands.generate import answer_all

        if out is not None:
            check_absent("--out", out)
        answers, notes = answer_all(config, prompt or [], prompts)
        for note in notes:
            screen.warn(note)
    lines = [vars(answer) for answer in answers]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json_module.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with placed_files(out) as folder:
            (folder / out.name).write_text(text, encoding="utf-8")
    if as_json:
        typer.echo(json_module.dumps({"answers": lines}))
    elif out is not None:
        typer.echo(f"{len(lines):,} answers in {out}")
    else:
        _show(answers)


def _read_config(given: Given) -> GenerateConfig:
    """Turn the flags into the configuration; `--adapter` names, or names and places."""
    adapters, chosen = {}, []
    for wish in given.values["adapter"] or []:
        label, equals, place = wish.partition("=")
        if not label or (equals and not place):
            raise ConfigError(f"--adapter {wish}: expected NAME, or NAME=DIR.")
        if label in adapters:
            raise ConfigError(f"two adapters are called {label!r}. Name one otherwise.")
        if equals:
            adapters[label] = place
        chosen.append(label)
    if adapters and len(adapters) == len(chosen):
        chosen = []  # all that are placed answer, and what else is named
    task = given.values["task"]
    return given.section(
        GenerateConfig,
        task=normal_task(task) if task else None,
        adapters=adapters,
        chosen=chosen,
    )


def _show(answers: Sequence[Any]) -> None:
    several = len({answer.adapter for answer in answers}) > 1
    asked = len({answer.prompt for answer in answers}) > 1
    before = None
    for answer in answers:
        is_new = answer.prompt != before
        before = answer.prompt
        if asked and is_new:
            typer.secho(f"» {answer.prompt}", dim=True)
        if answer.base is not None and is_new:
            typer.secho("base:  ", fg="yellow", nl=False)
            typer.echo(answer.base)
        if several or answer.base is not None:
            label = f"{answer.adapter}: " if several else "tuned: "
            typer.secho(label, fg="green", nl=False)
        typer.echo(answer.text)
        top = sorted(answer.scores.items(), key=lambda item: -item[1])[:3]
        if top:
            typer.secho("  " + ", ".join(f"{label} {p:.1%}" for label, p in top), dim=True)
