"""Extensions: commands, flags, tasks, methods and formats that packages add to ftlevel.

A package registers an `Extension` as an entry point of the group `ftlevel.extras`
(docs/extend.md). ftlevel's own are the subpackages of `ftlevel.extras`. They are read from the
package and not from its metadata, because metadata of an editable install is as old as the install.

References are "module:name" and are imported when they are used. A package that cannot be imported
is left out with a warning.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftlevel.errors import ConfigError
from ftlevel.world import should_print

GROUP = "ftlevel.extras"

HOOKS = (
    "complete_flags",
    "convert_keys",
    "convert_recipe",
    "detect_tool",
    "finish_run",
    "summarize_samples",
)
"""Functions that the core calls where an extension has them; docs/extend.md has the signatures."""


@dataclass(frozen=True)
class Command:
    """Command that an extension adds to the command line.

    Attributes:
        function: reference to its function, which has a parameter for each flag.
        summary: one line for `ftlevel --help`.
        config: reference to the configuration class whose fields the flags set; empty for none.
        accepts: returns whether the command also has train's flag for a field (dotted path).
        is_quiet: whether it has `--quiet`.
    """

    function: str
    summary: str
    config: str = ""
    accepts: Callable[[str], bool] | None = None
    is_quiet: bool = False


@dataclass(frozen=True)
class ExportFormat:
    """Export format; the output is a directory if `suffix` is empty.

    Attributes:
        module: module that writes the format, with `plan_export`.
        beside: suffixes of files written next to the output file.
        merges: whether an adapter is merged into the base first.
        several: whether one output can hold several adapters of one base.
    """

    module: str
    suffix: str
    beside: tuple[str, ...] = ()
    merges: bool = True
    several: bool = False

    @property
    def is_directory(self) -> bool:
        """Whether the output is a directory."""
        return not self.suffix


@dataclass(frozen=True)
class Extension:
    """What a package adds to ftlevel: a table (name → entry) for each kind of entry.

    Attributes:
        commands: name of a command → `Command`.
        flags: function that returns rows for the table of flags (`config.flag.Flag`).
        aliases: function that returns dotted field of a run → `FlagAliases` of its flag.
        tasks: value of `--task` → module with the task in its `TASKS`.
        methods: value of `--method` → references to its spec and to its `Method`.
        formats: suffix of a data file → reference to its `Reader`.
        export_formats: value of `--format` → `ExportFormat`.
        hooks: name in `HOOKS` → reference to a function.
        sections: name → reference to a `config.section.TaskSection`, a section of `TrainConfig`.
        task_aliases: other value of `--task` → task, and fields that it sets, by section.
        evaluate_options: references to subclasses of `EvaluateConfig` with further fields.
        data_checks: references to subclasses of `GateConfig` with further checks.
    """

    commands: Mapping[str, Command] = field(default_factory=dict)
    flags: Callable[[], Sequence[Any]] = tuple
    aliases: Callable[[], Mapping[str, Any]] = dict
    tasks: Mapping[str, str] = field(default_factory=dict)
    methods: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    formats: Mapping[str, str] = field(default_factory=dict)
    export_formats: Mapping[str, ExportFormat] = field(default_factory=dict)
    hooks: Mapping[str, str] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)
    task_aliases: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    evaluate_options: Sequence[str] = ()
    data_checks: Sequence[str] = ()

    def __post_init__(self) -> None:
        if unknown := set(self.hooks) - set(HOOKS):
            raise ValueError(f"no such hook: {', '.join(sorted(unknown))}")


OWN = "ftlevel"
_NOUNS = {
    "commands": "the command",
    "tasks": "the task",
    "methods": "the method",
    "formats": "the data format",
    "export_formats": "the export format",
    "sections": "the section",
    "task_aliases": "the task alias",
}


_EXTRAS = Path(__file__).with_name("extras")


def find_extensions() -> tuple[tuple[str, Extension], ...]:
    """Returns (package, extension) of all extensions, ftlevel's own first."""
    if (_EXTRAS / "__init__.py").is_file():
        importlib.import_module(GROUP)  # imports the configuration, which calls this function
    return _find_extensions()


@functools.cache
def _find_extensions() -> tuple[tuple[str, Extension], ...]:
    extensions = []
    for source, reference in (*_own(), *_installed()):
        if (extension := try_load(reference, source)) is None:
            continue
        if isinstance(extension, Extension):
            extensions.append((source, extension))
        else:
            warn_skipped(source, f"{reference} is not an Extension")
    return tuple(extensions)


def _own() -> list[tuple[str, str]]:
    names = sorted(path.parent.name for path in _EXTRAS.glob("*/__init__.py"))
    return [(OWN, f"{GROUP}.{name}:EXTENSION") for name in names]


def _installed() -> Iterator[tuple[str, str]]:
    from importlib.metadata import distributions

    seen = set()
    for distribution in distributions():
        try:
            text = distribution.read_text("entry_points.txt") or ""
            if f"[{GROUP}]" not in text or distribution.name in seen:  # parsing all takes 15 ms
                continue
            points = distribution.entry_points.select(group=GROUP)
        except (OSError, ValueError, LookupError) as error:
            warn_skipped(f"{distribution}", error)
            continue
        seen.add(distribution.name)
        for point in points:
            if not point.value.startswith(f"{GROUP}."):
                yield f"{distribution.name} {distribution.version}", point.value


def load(reference: str) -> Any:
    """Load the object that "module:name" refers to, or the module without a name."""
    module, _, name = reference.partition(":")
    imported = importlib.import_module(module)
    return getattr(imported, name) if name else imported


def try_load(reference: str, source: str) -> Any:
    """Returns the object at `reference`; warns and returns None if package `source` fails."""
    try:
        return load(reference)
    except Exception as error:
        if source == OWN:
            raise
        warn_skipped(source, error)
        return None


def warn_skipped(source: str, error: object) -> None:
    """Warn that a part of the package `source` is skipped because of `error`."""
    if not should_print():
        return
    type_name = f"{type(error).__name__}: " if isinstance(error, Exception) else ""
    text = " ".join(f"{type_name}{error}".split())
    sys.stderr.write(f"ftlevel: warning: {source} cannot be used ({text}).\n")


def added(table: str, core: Collection[str] = ()) -> dict[str, tuple[str, Any]]:
    """Returns name → (package, entry) of the `Extension` field `table`, for all extensions.

    Raises:
        ConfigError: a name is defined twice, or is in `core`, ftlevel's own names.
    """
    rows: dict[str, tuple[str, Any]] = {}
    for source, extension in find_extensions():
        for name, row in getattr(extension, table).items():
            if name in core or name in rows:
                first = rows[name][0] if name in rows else OWN
                raise ConfigError(
                    f"{_NOUNS[table]} {name!r} is defined by {first} and by {source}. Uninstall "
                    "one of them."
                )
            rows[name] = source, row
    return rows


def added_rows(table: str, core: Collection[str] = ()) -> dict[str, Any]:
    """Returns name → entry of the `Extension` field `table`; raises as `added` does."""
    return {name: row for name, (_, row) in added(table, core).items()}


def loaded(table: str, core: Collection[str] = ()) -> dict[str, Any]:
    """Returns name → imported object for each reference in `table`; omits those that fail."""
    objects = {name: try_load(row, source) for name, (source, row) in added(table, core).items()}
    return {name: value for name, value in objects.items() if value is not None}


def load_all(table: str) -> list[Any]:
    """Returns the imported objects of the references in `table`, a list; omits those that fail."""
    rows = ((s, row) for s, extension in find_extensions() for row in getattr(extension, table))
    return [value for s, row in rows if (value := try_load(row, s)) is not None]


def hooks(name: str) -> list[Callable[..., Any]]:
    """Returns the functions of all extensions for the hook `name`."""
    functions = [
        try_load(extension.hooks[name], source)
        for source, extension in find_extensions()
        if name in extension.hooks
    ]
    return [hook for hook in functions if hook is not None]
