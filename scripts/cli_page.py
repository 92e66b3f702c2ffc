"""Generate docs/cli.md and docs/commands from the table of flags."""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial

from ftlevel.cli.app import commands
from ftlevel.config.flag import Alias, Flag, NoOpValue, UnsupportedFlag, ValueAliases
from ftlevel.config.flags import FLAGS, flags_of
from page_parts import fill

COMMON = ("--json", "--quiet", "--traceback")
"""Flags that nearly every command has; docs/cli.md describes them."""

MAX_SHARED_FLAGS = 30
"""Number of flags shared with `train` above which a page refers to it."""

COMMANDS = commands()


def cli_page() -> str:
    """Return docs/cli.md with a line per command."""
    rows = [f"| [ftlevel {name}](commands/{name}.md) | {COMMANDS[name][1]} |" for name in COMMANDS]
    parts = {"commands": ["| command | |", "|---|---|", *rows], "shared": sorted(_shared_lines())}
    return fill("cli", {name: "\n".join(lines) for name, lines in parts.items()})


def command_pages() -> dict[str, Callable[[], str]]:
    """Return page name → function that returns its text, one per command."""
    return {f"commands/{name}": partial(command_page, name) for name in COMMANDS}


def command_page(name: str, flags: Sequence[Flag] = FLAGS) -> str:
    """Return docs/commands/NAME.md: description and flags."""
    return "\n".join(_command(name, flags)) + "\n"


def _command(name: str, flags: Sequence[Flag]) -> Iterator[str]:
    module, _, attribute = COMMANDS[name][0].partition(":")
    function = getattr(importlib.import_module(module), attribute)
    yield from (f"# ftlevel {name}", "", inspect.getdoc(function) or "")
    rows, count = _own_rows(name, flags), len(_flags_of_train(name, flags))
    if name != "train" and count > MAX_SHARED_FLAGS:
        total = len(flags_of("train", flags))
        yield f"\n`ftlevel {name}` accepts {count} of the {total} flags of"
        yield "[ftlevel train](train.md) (`--help-all` lists them), and these:"
    lines = {row.name: _line(row, name, flags) for row in rows}
    shared = [n for n in lines if name != "train" and lines[n] in _shared_lines()]
    rows = [row for row in rows if row.name not in shared]
    for panel in dict.fromkeys(row.panel for row in rows):
        yield from ("", f"## {panel or 'Arguments'}", "")
        yield from (lines[row.name] for row in rows if row.panel == panel)
    if shared:
        names = ", ".join(map(_code, shared))
        yield from ("", f"[As in other commands](../cli.md#flags-of-several-commands): {names}.")
    unsupported = [row for row in flags if isinstance(row, UnsupportedFlag) and name in row.on]
    if unsupported and name == "train":
        yield from ("", "## Not available", "")
        yield "These flags of other tools are refused, or accepted without effect, with the reason:"
        yield from ("", ", ".join(sorted({_code(row.name) for row in unsupported})) + ".")


def _flags_of_train(name: str, flags: Sequence[Flag]) -> list[Flag]:
    """Return the flags of `name` that set the same fields as those of `train`."""
    flags_of_train = flags_of("train", flags)
    return [row for row in flags_of(name, flags) if row in flags_of_train and row.path]


def _own_rows(name: str, flags: Sequence[Flag]) -> list[Flag]:
    """Return the flags on the page of `name`, without those of `train` if they are many."""
    rows = [row for row in flags_of(name, flags) if row.name not in COMMON]
    of_train = _flags_of_train(name, flags)
    if name == "train" or len(of_train) <= MAX_SHARED_FLAGS:
        return rows
    return [row for row in rows if row not in of_train]


@cache
def _shared_lines() -> frozenset[str]:
    """Return the lines that are equal in three commands or more."""
    lines = Counter(
        _line(row, name, FLAGS)
        for name in COMMANDS
        if name != "train"
        for row in _own_rows(name, FLAGS)
    )
    return frozenset(line for line, count in lines.items() if count > 2)


def _line(row: Flag, command: str, flags: Sequence[Flag]) -> str:
    """Returns a line on a flag, without aliases of `train` on other pages."""
    metadata, aliases = row.metadata(command), _aliases(flags)
    others = [] if command == "train" else flags_of("train", flags)
    excluded = {name for other in others for name in _names(other, aliases)}
    meaning, default = metadata.description, metadata.default
    names = [alias for alias in _names(row, aliases) if alias not in excluded]
    if not all(choice in meaning for choice in metadata.choices):
        meaning += f" One of {', '.join(metadata.choices)}."
    if row.required or metadata.required:
        meaning += " Required."
    elif default is not None and str(default).strip() and "efault" not in meaning:
        meaning += f" Default: {default}."
    if names:
        meaning += f" Also {', '.join(names)}."
    fields = ", ".join(_code(path) for path in (row.path, *row.by_task.values()))
    if command != "train" and row.name == f"--{row.path.replace('_', '-')}":
        fields = ""
    flag = ", ".join(_code(name) for name in row.typer_names(metadata.type is bool))
    return f"- {flag}{f' ({fields})' if fields.strip('`') else ''}: {meaning}"


def _aliases(flags: Sequence[Flag]) -> dict[str, list[Alias]]:
    """Return flag → all its aliases, which may be in several rows."""
    aliases: dict[str, list[Alias]] = {}
    for row in flags:
        aliases.setdefault(row.name, []).extend(row.alias_names)
    return aliases


def _names(row: Flag, aliases: Mapping[str, Sequence[Alias]]) -> Iterator[str]:
    if row.aliases.values:
        yield f"{_code(row.name)} ({_words(row.aliases.values)})"
    yield from dict.fromkeys(map(_with_values, aliases[row.name]))


def _with_values(alias: Alias) -> str:
    if alias.value:
        return f"{_code(alias.name)} ({alias.value})"
    words = _words(alias.values)
    return _code(alias.name) + (f" ({words})" if words else "")


def _words(words: ValueAliases) -> str:
    """Return values and their meanings; values that name a method in the same way are merged."""
    method_values = [
        foreign for foreign, meaning in words.items() if meaning == f"--method {foreign}"
    ]
    entries = [
        f"{foreign}: {'unchanged' if isinstance(meaning, NoOpValue) else meaning or 'none'}"
        for foreign, meaning in words.items()
        if foreign not in method_values
    ]
    return ", ".join([*entries, *(["METHOD: --method METHOD"] if method_values else [])])


def _code(text: str) -> str:
    return f"`{text}`" if text else ""
