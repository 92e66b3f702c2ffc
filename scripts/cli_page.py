"""Generate docs/cli.md and docs/commands from the table of flags."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from ftlevel.cli.app import commands
from ftlevel.config.flag import Alias, Flag, NoOpValue, UnsupportedFlag, ValueAliases
from ftlevel.config.flags import FLAGS, flags_of

MANY = 30
"""Number of flags shared with `train` above which a page refers to it."""

COMMANDS = commands()
_HEAD = """\
# The command line

This page lists all commands; each has a page with its flags. It is generated from the table of
flags, `src/ftlevel/config/flags.py`, by `python scripts/write_docs.py cli`.

Underscores are read as dashes. Second names are other tools' names of a flag. A field can be set by
its flag, by `--set field=value` or in a recipe; flags override `--set`, which overrides the recipe.
`ftlevel train --schema` lists all fields.

| command | |
|---|---|"""


def cli_page() -> str:
    """Return docs/cli.md: every command in a line."""
    rows = [f"| [ftlevel {name}](commands/{name}.md) | {COMMANDS[name][1]} |" for name in COMMANDS]
    return "\n".join([_HEAD, *rows]) + "\n"


def command_pages() -> dict[str, Callable[[], str]]:
    """Return page → what writes it, one a command."""
    return {f"commands/{name}": partial(command_page, name) for name in COMMANDS}


def command_page(name: str, flags: Sequence[Flag] = FLAGS) -> str:
    """Return docs/commands/NAME.md: description and flags."""
    return "\n".join(_command(name, flags)) + "\n"


def _command(name: str, flags: Sequence[Flag]) -> Iterator[str]:
    module, _, attribute = COMMANDS[name][0].partition(":")
    function = getattr(importlib.import_module(module), attribute)
    yield from (f"# ftlevel {name}", "", inspect.getdoc(function) or "")
    rows = flags_of(name, flags)
    of_train = [row for row in rows if row in flags_of("train", flags) and row.path]
    if name != "train" and len(of_train) > MANY:
        rows = [row for row in rows if row not in of_train]
        yield from (
            "",
            f"It accepts {len(of_train)} flags of [ftlevel train](train.md), all but those for "
            "output and logging. Additional flags:",
        )
    for panel in dict.fromkeys(row.panel for row in rows):
        yield from ("", f"## {panel or 'Arguments'}", "")
        yield "| flag | field | choices | default | second names | |"
        yield "|---|---|---|---|---|---|"
        yield from (_line(row, name, flags) for row in rows if row.panel == panel)
    answers = [row for row in flags if isinstance(row, UnsupportedFlag) and name in row.on]
    if name != "train" and len(answers) > MANY:
        yield from (
            "",
            "[ftlevel train](train.md#not-available) lists flags that are not available.",
        )
    elif answers:
        yield from ("", "## Not available", "")
        groups: dict[str, list[str]] = {}
        for row in answers:
            groups.setdefault(_answer(row), []).append(_code(row.shown))
        yield from (f"- {', '.join(names)}: {text}" for text, names in groups.items())


def _answer(row: UnsupportedFlag) -> str:
    """Return what `ftlevel` answers to a flag that is not available, by value."""
    words = [
        f"{_code(word)}: {meant.reason if isinstance(meant, NoOpValue) else _code(meant)}"
        for word, meant in row.aliases.values.items()
    ]
    return "; ".join([*words, row.message])


def _line(row: Flag, command: str, flags: Sequence[Flag]) -> str:
    metadata = row.metadata(command)
    is_required = row.required or metadata.required
    cells = [
        ", ".join(_code(name) for name in row.typer_names(metadata.type is bool)),
        ", ".join(_code(path) for path in (row.path, *row.by_task.values())),
        ", ".join(metadata.choices),
        "required" if is_required else "" if metadata.default is None else str(metadata.default),
        ", ".join(_second(row, flags)),
        metadata.description,
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _second(row: Flag, flags: Sequence[Flag]) -> Iterator[str]:
    if row.aliases.values:
        yield f"{_code(row.shown)} ({_words(row.aliases.values)})"
    seconds = [other for each in flags if each.shown == row.shown for other in each.alias_names]
    yield from dict.fromkeys(map(_with_values, seconds))


def _with_values(other: Alias) -> str:
    if other.value:
        return f"{_code(other.name)} ({other.value})"
    words = _words(other.values)
    return _code(other.name) + (f" ({words})" if words else "")


def _words(words: ValueAliases) -> str:
    return ", ".join(
        f"{theirs}: {'unchanged' if isinstance(ours, NoOpValue) else ours or 'none'}"
        for theirs, ours in words.items()
    )


def _code(text: str) -> str:
    return f"`{text}`" if text else ""
