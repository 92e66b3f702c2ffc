"""How a command line is read: dashes or underscores, second names, panels, a line for a mistake."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand

from ftlevel.artifacts.files import describe_interrupt
from ftlevel.cli.typed.spelling import Reading, Rewritten, rewrite
from ftlevel.config.flags import DAILY, GENERAL
from ftlevel.config.layers import find_setting
from ftlevel.errors import ConfigError, Interrupted, did_you_mean

_WIDEST_NAME = 28  # of a flag that shares its line with its help


class Command(TyperCommand):
    """A command that accepts the second names of its flags and shows them in panels."""

    readings: ClassVar[Mapping[str, Reading]] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Rewrite flags to their canonical spelling before they are parsed."""
        if "--help-all" in args and "--help-all" in self.readings:
            ctx.meta["ftlevel.shows_all"] = True
            typer.echo(self.get_help(ctx))
            raise typer.Exit
        done = rewrite(args, self.readings)
        ctx.meta["ftlevel.typed"], ctx.meta["ftlevel.claims"] = done.typed, done.claims
        try:
            return super().parse_args(ctx, list(done.arguments))  # which the parser empties
        except typer.TyperException as error:
            if hasattr(error, "possibilities"):
                self._explain(error, str(getattr(error, "option_name", "")))
            _name_value(error, done)
            raise

    def _explain(self, error: Any, name: str) -> None:
        """Say what an unknown flag may mean: a field without a flag, or one that looks like it.

        Raises:
            ConfigError: it is the name of a field.
        """
        field = find_setting(name.lstrip("-").replace("-", "_")) if self.has_settings else ""
        if field:
            raise ConfigError(f"{name} is no flag, but a field: --set {field}=VALUE.") from None
        error.message = f"{error.message}.{did_you_mean(name, self.readings)}"
        error.possibilities = None

    @property
    def has_settings(self) -> bool:
        """Whether `--set` reaches every field."""
        return "--set" in self.readings

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
        if DAILY in panels and not ctx.meta.get("ftlevel.shows_all"):
            panels = _daily(panels)
        for title, records in panels.items():
            with formatter.section(title):
                for name, text in records:
                    formatter.write(_entry(name, text, column, formatter.width))

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C is said, which Typer would turn into a bare exit code.

        Raises:
            Interrupted: the user pressed Ctrl-C, and the command did not catch it.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted(describe_interrupt()) from None


def _name_value(error: Any, done: Rewritten) -> None:
    """Raise an error about the value of a flag again with the value, which Typer leaves out.

    Raises:
        ConfigError: the value is known.
    """
    names = getattr(getattr(error, "param", None), "opts", None) or []
    words = [part for word in done.arguments for part in word.split("=", 1)]
    places = [at for at, word in enumerate(words[:-1]) if word in names]
    if not places:
        return
    name, value = words[places[-1]], words[places[-1] + 1]
    reason = str(error.message).rstrip(".")
    raise ConfigError(
        f"{done.typed.get(name, name)}: {value!r} cannot be used: {reason[:1].lower()}{reason[1:]}."
    ) from None


def _daily(panels: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the panels that `--help` shows: the flags of every day, and the way to the others."""
    shown = {title: panels[title] for title in ("Arguments", DAILY) if title in panels}
    others = [title for title in panels if title not in shown and title != GENERAL]
    ways = ("--help-all", "-h", "--recipe", "--set", "--dry-run")
    few = [record for records in panels.values() for record in records
           if record[0].split()[0].rstrip(",") in ways]  # fmt: skip
    hidden = sum(len(records) for title, records in panels.items() if title not in shown) - len(few)
    return {**shown, f"And {hidden} more: {', '.join(others)}": few}


def _entry(name: str, text: str, column: int, width: int) -> str:
    """Return a flag and its help, from `column` on; no word of it is broken at a dash."""
    head = f"  {name} ".ljust(column)
    lines = textwrap.wrap(text, width - column, break_on_hyphens=False, break_long_words=False)
    if len(head) > column or not lines:
        lines.insert(0, "")
    rest = "".join(f"{' ' * column}{line}\n" for line in lines[1:])
    return f"{head}{lines[0]}".rstrip() + "\n" + rest
