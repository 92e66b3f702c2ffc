"""`ftlevel generate`: generate from prompts, or chat in the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ftlevel.cli.flags import CommandInput
from ftlevel.cli.startup import echo_styled, heavy_imports
from ftlevel.config import GenerateConfig
from ftlevel.errors import ConfigError
from ftlevel.safe_io import save_text

if TYPE_CHECKING:
    from ftlevel.commands.generate import Chat


def generate(
    inputs: CommandInput,
    *,
    prompt: list[str] | None,
    prompts: Path | None,
    out: Path | None,
    chat: bool,
    as_json: bool,
) -> None:
    """Generate answers to prompts, or chat in the terminal.

    Prompts use the run's own template; decoding is greedy unless --temperature is given. The answer
    depends on the task: text, a class, classes with a probability above 0.5, a number, tagged
    words, words for each [MASK], or the answer span in --context.
    """
    config = _read_config(inputs)
    if chat:
        if prompt or prompts or out or as_json or config.against:
            raise ConfigError(
                "--chat reads from the terminal. Drop --prompt, --prompts, --out, --json and "
                "--against."
            )

        talk(config)
        return
    if not (prompt or prompts):
        raise ConfigError("no prompt. Add --prompt TEXT, --prompts FILE or --chat.")
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=True) as screen:
        from ftlevel.artifacts.files import atomic_files, check_new_output

        with heavy_imports():
            from ftlevel.commands.generate import generate_answers

        if out is not None:
            check_new_output("--out", out)
        answers, notes = generate_answers(config, prompt or [], prompts)
        for note in notes:
            screen.warn(note)
    lines = [vars(answer) for answer in answers]
    if out is not None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with atomic_files(out) as folder:
            save_text(folder / out.name, text)
    if as_json:
        typer.echo(json.dumps({"answers": lines}))
    elif out is not None:
        typer.echo(f"{len(lines):,} answers in {out}")
    else:
        _show(answers)


def _read_config(inputs: CommandInput) -> GenerateConfig:
    adapters, selected = {}, []
    for pair in inputs.values["adapter"] or []:
        label, equals, path = pair.partition("=")
        if not label or (equals and not path):
            raise ConfigError(f"--adapter {pair}: expected NAME, or NAME=DIR.")
        if label in adapters:
            raise ConfigError(f"two adapters are called {label!r}. Choose another name.")
        if equals:
            adapters[label] = path
        selected.append(label)
    if adapters and len(adapters) == len(selected):
        selected = []  # every given adapter generates
    return inputs.section(GenerateConfig, adapters=adapters, chosen=selected)


def _show(answers: Sequence[Any]) -> None:
    show_adapter = len({answer.adapter for answer in answers}) > 1
    show_prompt = len({answer.prompt for answer in answers}) > 1
    before = None
    for answer in answers:
        is_new = answer.prompt != before
        before = answer.prompt
        if show_prompt and is_new:
            echo_styled(f"» {answer.prompt}", dim=True)
        if answer.base is not None and is_new:
            echo_styled("base:  ", fg="yellow", nl=False)
            typer.echo(answer.base)
        if show_adapter or answer.base is not None:
            label = f"{answer.adapter}: " if show_adapter else "tuned: "
            echo_styled(label, fg="green", nl=False)
        typer.echo(answer.text)
        top = sorted(answer.scores.items(), key=lambda item: -item[1])[:3]
        if top:
            echo_styled("  " + ", ".join(f"{label} {p:.1%}" for label, p in top), dim=True)


HELP = """\
/adapter NAME   switch to an adapter (without NAME: list them)
/base           switch to the base model
/reset          clear the conversation
/quit           exit, like Ctrl-D"""


def talk(config: GenerateConfig) -> None:
    """Chat in the terminal until /quit or end of input."""
    with heavy_imports():
        from ftlevel.commands.generate import Chat

    chat = Chat(config)
    for note in chat.adapters.notes:
        echo_styled(f"warning: {note}", fg="yellow", err=True)
    _greet(chat)
    while True:
        try:
            text = input("» ").strip()
        except EOFError:
            typer.echo()
            return
        if text == "/quit":
            return
        if text.startswith("/"):
            _obey(chat, text)
        elif text:
            _answer(chat, text)


def _greet(chat: Chat) -> None:
    memory = (
        ""
        if chat.uses_history
        else "; earlier turns are not kept: the model was trained on single prompts"
    )
    echo_styled(f"{chat.active_adapter} answers{memory}. /help shows the commands.", dim=True)


def _answer(chat: Chat, text: str) -> None:
    before = chat.num_dropped
    try:
        chat.reply(text, lambda piece: typer.echo(piece, nl=False))
        typer.echo()
    except KeyboardInterrupt:  # stops the answer, not the conversation
        typer.echo(" …")
    if chat.num_dropped > before:
        echo_styled("(no room: the oldest messages are forgotten)", dim=True)


def _obey(chat: Chat, command: str) -> None:
    word, _, name = command.partition(" ")
    name = name.strip()
    if word == "/reset":
        chat.reset()
        echo_styled("forgotten.", dim=True)
    elif word == "/base" or (word == "/adapter" and name):
        try:
            chat.switch("base" if word == "/base" else name)
        except ConfigError as error:
            echo_styled(str(error), fg="yellow")
        else:
            _greet(chat)
    elif word == "/adapter":
        typer.echo(", ".join(chat.adapters.models))
    else:
        typer.echo(HELP)
