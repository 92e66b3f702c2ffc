"""The terminal's side of `ftlevel generate --chat`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from ftlevel.cli.startup.heavy_imports import heavy_imports
from ftlevel.config import GenerateConfig
from ftlevel.errors import ConfigError

if TYPE_CHECKING:
    from ftlevel.commands.chat import Chat

HELP = """\
/adapter NAME   let that adapter go on (without NAME: show them)
/base           let the base model go on
/reset          forget what was said
/quit           leave, as Ctrl-D does"""


def talk(config: GenerateConfig) -> None:
    """Read lines from the terminal and answer them until /quit or the end of the input."""
    with heavy_imports():
        from ftlevel.commands.chat import Chat

    chat = Chat(config)
    for note in chat.adapters.notes:
        typer.secho(f"warning: {note}", fg="yellow", err=True)
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
    memory = "" if chat.remembers else "; it was trained on single prompts: each is asked alone"
    typer.secho(f"{chat.speaker} answers{memory}. /help shows the commands.", dim=True)


def _answer(chat: Chat, text: str) -> None:
    before = chat.forgotten
    try:
        chat.say(text, lambda piece: typer.echo(piece, nl=False))
        typer.echo()
    except KeyboardInterrupt:  # stops the answer, not the conversation
        typer.echo(" …")
    if chat.forgotten > before:
        typer.secho("(no room: the oldest messages are forgotten)", dim=True)


def _obey(chat: Chat, command: str) -> None:
    word, _, name = command.partition(" ")
    name = name.strip()
    if word == "/reset":
        chat.reset()
        typer.secho("forgotten.", dim=True)
    elif word == "/base" or (word == "/adapter" and name):
        try:
            chat.switch("base" if word == "/base" else name)
        except ConfigError as error:
            typer.secho(str(error), fg="yellow")
        else:
            _greet(chat)
    elif word == "/adapter":
        typer.echo(", ".join(chat.adapters.voices))
    else:
        typer.echo(HELP)
