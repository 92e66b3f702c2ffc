"""Find the format of a table: which column has which role in a task.

A task declares shapes, sets of roles such as "document" and "summary". A format assigns a column to
each role, by names common in published datasets or by `--map`. `examples` converts the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, TypeAlias

from ftlevel.data.formats.columns import (
    NON_TEXT_ROLES,
    column_for_flag,
    format_map_flags,
    is_media_column,
    rank_columns,
    resolve_column,
    source_columns,
)
from ftlevel.data.sources.table import Row
from ftlevel.errors import InputError, closest_matches, did_you_mean, join_names, quote

Names: TypeAlias = Mapping[str, tuple[str, ...]]
ExampleBuilder: TypeAlias = Callable[[Any], Any]
"""Function from the `RoleValues` of a row to its example; raises `UnusableRowError`."""


@dataclass(frozen=True)
class Format:
    """Assignment of a table's columns to the roles of a task.

    Attributes:
        build: function that converts a row to an example.
        columns: column by role; "answers.text" is a nested key.
        unused: columns without a role.
        options: task-specific findings, such as the problem type.
        inner: names by role within a turn: role and content keys, user and assistant.
    """

    task: str
    name: str
    build: ExampleBuilder
    columns: Mapping[str, str]
    unused: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    inner: Mapping[str, str] = field(default_factory=dict)

    @property
    def description(self) -> str:
        """The column of each role, in one line."""
        used = ", ".join(
            quote(column) if role == column else f"{role} from {quote(column)}"
            for role, column in self.columns.items()
        )
        used += "".join(f", {role} is {name!r}" for role, name in self.inner.items())
        idle = f"; not used: {join_names(map(quote, self.unused))}" if self.unused else ""
        return f"{self.name}: {used}{idle}"


def explain_columns(
    columns: Mapping[str, str], mapping: Mapping[str, str], name: str | None
) -> str:
    """Return why `columns` are used: the flags that chose them, or their names if these differ."""
    if mapping or name:
        flags = (("--map", mapping), ("--format", name))
        return "by " + " and ".join(flag for flag, given in flags if given)
    return "" if all(role == column for role, column in columns.items()) else "by their names"


@dataclass(frozen=True)
class FormatOptions:
    """The user's choice of columns.

    `mapping` is the column by role (`--map`), `name` the format (`--format`), and `aim` the verb
    for error messages.
    """

    mapping: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None
    aim: str = "learn"


@dataclass(frozen=True)
class FormatSpec:
    """A set of roles, each with its usual column names, the most common first.

    Attributes:
        guessable: whether errors suggest it even if no column name matches.
        inner: roles of `--map` that name keys within a column rather than columns.
    """

    name: str
    build: ExampleBuilder
    required: Names
    optional: Names = field(default_factory=dict)
    guessable: bool = True
    inner: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The name for `--format`."""
        return self.name.replace(" + ", "-").replace("_", "-")

    @property
    def roles(self) -> Names:
        """All roles, required ones first."""
        return {**self.required, **self.optional}


_OTHER_NAMES = {
    "sharegpt": "conversations",
    "openai": "messages",
    "alpaca": "instruction-output",
    "squad": "context-question-answers",
    "plain": "text",
}
"""Aliases of formats."""


_OTHER_ROLES = {
    "text": ("document", "tokens", "source"),
    "words": ("tokens",),
    "entities": ("spans",),
    "label": ("tags",),
    "labels": ("label", "tags"),
    "answer": ("answers", "completion", "output"),
    "answers": ("completion", "output"),
    "response": ("completion", "output"),
    "completion": ("output",),
    "prompt": ("instruction",),
}
"""Aliases of roles, used only if the task has no role of that name."""


class NoFormatError(InputError):
    """No shape of a task fits the columns; another task may fit."""


def detect_format(
    columns: Sequence[str],
    task: str,
    shapes: Sequence[FormatSpec],
    wish: FormatOptions | None = None,
    rows: Sequence[Row] = (),
) -> Format:
    """Return the format of `columns` for a task: the first of `shapes` that fits.

    `wish` restricts the shapes. `rows` are a sample of the table, used to suggest flags in errors.

    Raises:
        NoFormatError: no shape fits, and the user chose none.
        InputError: the user's choice does not fit, or names a missing column.
    """
    wish = wish or FormatOptions()
    known = shapes
    if wish.name is not None:
        shapes = _pick_shapes(shapes, wish.name, task)
    inner = {role for shape in shapes for role in shape.inner}
    inside = {role: name for role, name in wish.mapping.items() if role in inner}
    told = {role: name for role, name in wish.mapping.items() if role not in inner}
    told = _resolve_mapping(columns, task, shapes, told)
    wanted = {_role(role, shapes): column for role, column in told.items()}
    as_meant = ((s, {_role(role, [s]): c for role, c in told.items()}) for s in shapes)
    for shape, mapping in (*((shape, wanted) for shape in shapes), *as_meant):
        found = _match(shape, columns, mapping) if inside.keys() <= set(shape.inner) else None
        if found is not None and all(role in found for role in shape.required):
            used = {part for column in found.values() for part in source_columns(column, columns)}
            unused = tuple(name for name in columns if name not in used)
            return Format(task, shape.name, shape.build, found, unused, inner=inside)
    named = len(shapes) < len(known)
    error = InputError if wanted or named else NoFormatError
    advice = _FormatSuggestion(columns, task, shapes, wanted, rows, named=named)
    raise error(advice.describe(wish.aim))


def _role(name: str, shapes: Sequence[FormatSpec]) -> str:
    """Return the role of `shapes` with the name or alias `name`."""
    roles = {role for shape in shapes for role in shape.roles}
    if name in roles:
        return name
    return next((role for role in _OTHER_ROLES.get(name, ()) if role in roles), name)


def fits(columns: Sequence[str], shapes: Sequence[FormatSpec]) -> bool:
    """Return whether `columns` have all required roles of one of `shapes`."""
    return any((_match(shape, columns, {}) or {}).keys() >= set(shape.required) for shape in shapes)


def _pick_shapes(shapes: Sequence[FormatSpec], name: str, task: str) -> tuple[FormatSpec, ...]:
    """Return the shapes of the format called `name`, such as prompt-completion or squad."""
    wish = name.strip().lower().replace("_", "-")
    wish = _OTHER_NAMES.get(wish, wish)
    found = tuple(shape for shape in shapes if shape.slug == wish)
    if not found:
        names = list(dict.fromkeys(shape.slug for shape in shapes))
        raise InputError(
            f"--format {name}: --task {task} has no such format.{did_you_mean(wish, names)} "
            f"It has: {join_names(names)}."
        )
    return found


def _resolve_mapping(
    columns: Sequence[str], task: str, shapes: Sequence[FormatSpec], mapping: Mapping[str, str]
) -> dict[str, str]:
    """Return `mapping` with resolved columns; raise for an unknown role or a missing column."""
    roles = list(dict.fromkeys(role for shape in shapes for role in shape.roles))
    problems = []
    found = {}
    for role, wish in mapping.items():
        column = resolve_column(wish, columns)
        if _role(role, shapes) not in roles:
            problems.append(
                f"--map {role}={wish}: --task {task} has no {role!r}."
                f"{did_you_mean(role, roles)} It has: {join_names(roles)}."
            )
        if column is None:
            lost = [part for part in wish.split("+") if resolve_column(part, columns) is None]
            name = lost[0].strip() if lost else wish
            meant = wish.replace(",", "+")
            hint = did_you_mean(name, columns)
            if meant != wish and resolve_column(meant, columns) is not None:
                hint = f" Columns are joined by a plus: --map {role}={meant}."
            problems.append(
                f"--map {role}={wish}: no column {name!r}.{hint} "
                f"Columns: {join_names(map(quote, columns))}."
            )
        elif role in NON_TEXT_ROLES and len(source_columns(column, columns)) > 1:
            problems.append(f"--map {role}={wish}: only texts can be joined. Name one column.")
        else:
            found[role] = column
    if problems:
        raise InputError(problems)
    return found


def _match(
    shape: FormatSpec, columns: Sequence[str], mapping: Mapping[str, str]
) -> dict[str, str] | None:
    """Return the column of each role found; None if `shape` lacks a role in `mapping`."""
    if not mapping.keys() <= shape.roles.keys():
        return None
    folded = {column.lower(): column for column in reversed(columns)}
    found: dict[str, str] = {}
    taken = set(mapping.values())
    for role, names in shape.roles.items():
        column = mapping.get(role) or next(
            (
                hit
                for name in names
                if (hit := name if name in columns else folded.get(name)) and hit not in taken
            ),
            None,
        )
        if column:
            found[role] = column
            taken.add(column)
    return found


@dataclass(frozen=True)
class _FormatSuggestion:
    """Error message for columns that fit no shape; `named` is true if the user chose the format."""

    columns: Sequence[str]
    task: str
    shapes: Sequence[FormatSpec]
    mapping: Mapping[str, str]
    rows: Sequence[Row]
    _: KW_ONLY
    named: bool

    def describe(self, aim: str) -> str:
        """Return the message, with the `--map` flags for the closest shape."""
        there = f"Columns: {join_names(map(quote, self.columns))}."
        wants = join_names(dict.fromkeys(shape.name for shape in self.shapes))
        offers = [offer for shape in self.shapes if (offer := self._offer(shape)) is not None]
        if not offers:
            pairs = format_map_flags(self.mapping)
            return f"{pairs}: no format of --task {self.task} has all of these. Formats: {wants}."
        flags = min(offers, key=lambda offer: offer[0])[1]
        media = [quote(name) for name in self.columns if is_media_column(name)]
        if media and "=COLUMN" in flags:
            there = f"{there} {join_names(media)} contains no text."
        return (
            f"--task {self.task}: the columns do not say what to {aim}. {there} "
            f"Expected one of: {wants}. Map the columns: {flags}."
        )

    def _offer(self, shape: FormatSpec) -> tuple[tuple[int, int, int], str] | None:
        """Return a sort key (lower is closer) and the flags that would make `shape` fit.

        None if no column matches, unless the user chose the shape or it is guessable.
        """
        found = _match(shape, self.columns, self.mapping)
        if found is None:
            return None
        used = {part for column in found.values() for part in source_columns(column, self.columns)}
        free = [name for name in self.columns if name not in used]
        missing = [role for role in shape.required if role not in found]
        guesses: dict[str, str] = {}
        for role in missing:
            able = rank_columns(free, role, self.rows)
            close = [hit for name in shape.required[role] for hit in closest_matches(name, able)]
            if close:
                guesses[role] = close[0]
                free.remove(close[0])
        evidence = len(found) + len(guesses)
        if not evidence and not shape.guessable and not self.named and not self._is_turns(shape):
            return None
        pairs = dict(self.mapping)
        lacking = 0
        for role in sorted(missing, key=lambda role: role not in _FIRST):
            able = rank_columns(free, role, self.rows)
            column = guesses.get(role) or next(iter(able), None)
            if column in free:
                free.remove(column)
            lacking += column is None
            pairs[role] = column or "COLUMN"
        order = [*self.mapping, *(role for role in shape.required if role in pairs)]
        flags = format_map_flags(
            {role: column_for_flag(pairs[role], self.columns) for role in order}
        )
        return (lacking, -evidence, len(missing) if evidence else 0), flags

    def _is_turns(self, shape: FormatSpec) -> bool:
        """Return whether a column holds lists of objects, as conversation shapes need."""
        roles = list(shape.required)
        return bool(self.rows and shape.inner and rank_columns(self.columns, roles[0], self.rows))


_FIRST = ("label",)
"""Roles assigned first: the label is the column with the fewest values."""
