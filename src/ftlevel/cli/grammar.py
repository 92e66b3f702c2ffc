"""How a command line is read: dashes or underscores, second names, panels, a line for a mistake."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from typer.core import TyperCommand

from ftlevel.config.flags import GENERAL
from ftlevel.errors import ConfigError, Interrupted

Seconds = Mapping[str, tuple[str, Mapping[str, str]]]
"""Second name → (the flag's own, their word for a value → ours)."""


_WIDEST_NAME = 28  # of a flag that shares its line with its help


class Command(TyperCommand):
    """A command that accepts the second names of its flags and shows them in panels."""

    seconds: ClassVar[Seconds] = {}
    answers: ClassVar[Mapping[str, str]] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Rewrite flags to their canonical spelling before they are parsed."""
        known = {option for parameter in self.params for option in parameter.opts}
        rewritten = list(canonical(args, known, self.seconds))
        for argument in rewritten:
            name = argument.partition("=")[0]
            if name in self.answers:
                raise ConfigError(f"{name}: {self.answers[name]}")
        return super().parse_args(ctx, rewritten)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section a panel; importing rich for it would double the time of `--help`."""
        panels: dict[str, list[Any]] = {}
        parameters: list[Any] = self.get_params(ctx)
        for parameter in parameters:
            is_argument = parameter.param_type_name == "argument"
            title = "Arguments" if is_argument else parameter.rich_help_panel or GENERAL
            panels.setdefault(title, []).append(parameter.get_help_record(ctx))
        names = [name for records in panels.values() for name, _ in records]
        column = min(max(map(len, names)), _WIDEST_NAME) + 4
        for title, records in panels.items():
            with formatter.section(title):
                for name, text in records:
                    formatter.write(_entry(name, text, column, formatter.width))

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C is said, which Typer would turn into a bare exit code.

        Raises:
            Interrupted: the user pressed Ctrl-C, and the command had nothing to keep.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted; nothing was kept.") from None


def _entry(name: str, text: str, column: int, width: int) -> str:
    """Return a flag and its help, from `column` on; no word of it is broken at a dash."""
    head = f"  {name}".ljust(column)
    lines = textwrap.wrap(text, width - column, break_on_hyphens=False, break_long_words=False)
    if len(head) > column or not lines:
        lines.insert(0, "")
    rest = "".join(f"{' ' * column}{line}\n" for line in lines[1:])
    return f"{head}{lines[0]}".rstrip() + "\n" + rest


def canonical(arguments: Iterable[str], known: Collection[str], seconds: Seconds) -> Iterator[str]:
    """Yield the arguments in ftlevel's spelling: `--lora_rank=8` is `--lora-r=8`.

    Args:
        arguments: as they were typed.
        known: the flags that the command has.
        seconds: second names, and what they stand for in a command that has that flag.
    """
    words: Mapping[str, str] = {}
    for argument in arguments:
        if argument in words or not argument.startswith("--"):
            yield words.get(argument, argument)
            words = {}
            continue
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        own, words = seconds.get(name, (name, {}))
        if name in known or own not in known:
            own, words = name, {}
        yield own + equals + words.get(value, value)
        words = {} if equals else words
