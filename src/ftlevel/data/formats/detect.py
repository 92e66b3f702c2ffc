"""Detect the format of a table (which column has which role) and read values by role.

A task declares shapes (`FormatSpec`), sets of roles such as "document" and "summary". A `Format`
assigns a column to each role of a shape, by names common in published datasets or by `--map`. The
module `examples` converts the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from ftlevel.data.formats.columns import (
    JOINER,
    JSON_ROLES,
    NON_TEXT_ROLES,
    column_for_flag,
    format_map_flags,
    is_media_column,
    rank_columns,
    resolve_column,
    source_columns,
)
from ftlevel.data.formats.turns import UnusableRowError, check_text, parse_json, parse_turn_list
from ftlevel.data.sources.table import Row, Table, json_type_name
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
        options: task settings found in the data, such as the problem type.
        inner: names in the data for the keys `role` and `content`, and for user and assistant.
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
        unused = f"; not used: {join_names(map(quote, self.unused))}" if self.unused else ""
        return f"{self.name}: {used}{unused}"


_TURNS = ("prompt", "completion", "chosen", "rejected")
"""Roles whose value is a string or a list of turns."""


class RoleValues:
    """Values of a row by role; `set_row` selects the row."""

    def __init__(self, format_: Format, table: Table) -> None:
        self.columns = format_.columns
        self.inner = format_.inner
        self.table = table
        self.row: Row = {}
        self.index = 0

    def set_row(self, row: Row, index: int) -> None:
        """Set the current row, which has position `index` in the table."""
        self.row, self.index = row, index

    def __contains__(self, role: str) -> bool:
        return role in self.columns

    def get(self, role: str) -> Any:
        """Returns the value of `role`; None if the format has no column for it.

        Text is parsed as JSON for roles with lists or objects, and for conversations in CSV cells.
        """
        column = self.columns.get(role)
        if column is None:
            return None
        is_joined = "+" in column and column not in self.row
        value = self._join(column) if is_joined else self._lookup(column)
        if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
            return value
        if role in JSON_ROLES:
            try:
                return parse_json(value, repr(column))
            except UnusableRowError as error:
                raise UnusableRowError(
                    f"{error}. Write lists and objects as JSON, with json.dumps"
                ) from None
        is_cell = role in _TURNS and self.table.has_text_cells(self.index)
        return parse_turn_list(value) if is_cell else value

    def _join(self, column: str) -> str:
        texts = []
        for name in column.split("+"):
            value = self._lookup(name)
            if value is not None and not isinstance(value, str):
                raise UnusableRowError(
                    f"{name!r} is {json_type_name(value)}, and only texts can be joined"
                )
            if value and value.strip():
                texts.append(value)
        return JOINER.join(texts)

    def _lookup(self, column: str) -> Any:
        if column in self.row:
            return self.row[column]
        value: Any = self.row
        for part in column.split("."):
            if value is self.row and part not in value:
                raise UnusableRowError(f"has no {part!r}")
            if not isinstance(value, dict) or part not in value:
                raise UnusableRowError(f"{column!r} is not there ({part!r} is missing)")
            value = value[part]
        return value

    def text(self, role: str) -> str:
        """Returns the text of `role`; raises `UnusableRowError` if it is empty."""
        return check_text(self.get(role), repr(self.columns[role]))

    def text_or_empty(self, role: str) -> str:
        """Returns the text of `role`; "" if it is null or blank, or has no column."""
        value = self.get(role)
        if value is None or (isinstance(value, str) and not value.strip()):
            return ""
        return check_text(value, repr(self.columns[role]))


def explain_columns(
    column_mapping: Mapping[str, str], mapping: Mapping[str, str], name: str | None
) -> str:
    """Returns "by --map", "by --format", "found by name", or "" if columns are named like roles."""
    if mapping or name:
        flags = (("--map", mapping), ("--format", name))
        return "by " + " and ".join(flag for flag, value in flags if value)
    return "" if all(role == column for role, column in column_mapping.items()) else "found by name"


@dataclass(frozen=True)
class FormatSpec:
    """A set of roles, each with its usual column names, the most common first.

    Attributes:
        guessable: whether errors suggest these roles even if no column name matches.
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
        """Usual column names of each role, required roles first."""
        return {**self.required, **self.optional}


_FORMAT_ALIASES = {
    "sharegpt": "conversations",
    "openai": "messages",
    "alpaca": "instruction-output",
    "squad": "context-question-answers",
    "plain": "text",
}
"""Aliases of formats."""


_ROLE_ALIASES = {
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
    """The columns fit no format of the task; they may fit a different task."""


def detect_format(
    column_names: Sequence[str],
    task: str,
    shapes: Sequence[FormatSpec],
    chosen: Mapping[str, str] = MappingProxyType({}),
    name: str | None = None,
    rows: Sequence[Row] = (),
) -> Format:
    """Returns the format of a table: the first of `shapes` that its columns match.

    The user's `chosen` columns (role -> column) and format `name` restrict the shapes. `rows` are a
    sample, used to suggest flags in errors. Raises `NoFormatError` if no shape fits and the user
    chose none, `InputError` if the user's choice does not fit or names a missing column.
    """
    selected = shapes if name is None else _select_shapes(shapes, name, task)
    inner_roles = {role for shape in selected for role in shape.inner}
    inner = {role: column for role, column in chosen.items() if role in inner_roles}
    outer = {role: column for role, column in chosen.items() if role not in inner_roles}
    outer = _resolve_mapping(column_names, task, selected, outer)
    mapping = {_role(role, selected): column for role, column in outer.items()}
    by_shape = ((s, {_role(role, [s]): c for role, c in outer.items()}) for s in selected)
    for shape, shape_mapping in (*((shape, mapping) for shape in selected), *by_shape):
        if inner.keys() <= set(shape.inner):
            matched = _match(shape, column_names, shape_mapping)
            if matched is not None and matched.keys() >= shape.required.keys():
                unused = _unused(column_names, matched)
                return Format(task, shape.name, shape.build, matched, unused, inner=inner)
    is_selected = len(selected) < len(shapes)
    error = InputError if mapping or is_selected else NoFormatError
    suggestion = _FormatSuggestion(column_names, task, selected, mapping, rows, named=is_selected)
    raise error(suggestion.describe())


def _unused(column_names: Sequence[str], matched: Mapping[str, str]) -> tuple[str, ...]:
    used = {name for column in matched.values() for name in source_columns(column, column_names)}
    return tuple(name for name in column_names if name not in used)


def _role(name: str, shapes: Sequence[FormatSpec]) -> str:
    roles = {role for shape in shapes for role in shape.roles}
    if name in roles:
        return name
    return next((role for role in _ROLE_ALIASES.get(name, ()) if role in roles), name)


def fits(column_names: Sequence[str], shapes: Sequence[FormatSpec]) -> bool:
    """Returns whether `column_names` have all required roles of one of `shapes`."""
    return any(
        (_match(shape, column_names, {}) or {}).keys() >= set(shape.required) for shape in shapes
    )


def _select_shapes(shapes: Sequence[FormatSpec], name: str, task: str) -> tuple[FormatSpec, ...]:
    slug = name.strip().lower().replace("_", "-")
    slug = _FORMAT_ALIASES.get(slug, slug)
    selected = tuple(shape for shape in shapes if shape.slug == slug)
    if not selected:
        names = list(dict.fromkeys(shape.slug for shape in shapes))
        raise InputError(
            f"--format {name}: --task {task} has no such format.{did_you_mean(slug, names)} "
            f"It has: {join_names(names)}."
        )
    return selected


def _resolve_mapping(
    column_names: Sequence[str], task: str, shapes: Sequence[FormatSpec], mapping: Mapping[str, str]
) -> dict[str, str]:
    roles = list(dict.fromkeys(role for shape in shapes for role in shape.roles))
    problems = []
    resolved = {}
    for role, name in mapping.items():
        column, flag = resolve_column(name, column_names), f"--map {role}={name}"
        if _role(role, shapes) not in roles:
            problems.append(
                f"{flag}: --task {task} has no {role!r}.{did_you_mean(role, roles)} "
                f"It has: {join_names(roles)}."
            )
        if column is None:
            absent = (
                part for part in name.split("+") if resolve_column(part, column_names) is None
            )
            part, joined = next(absent, name).strip(), name.replace(",", "+")
            hint = did_you_mean(part, column_names)
            if joined != name and resolve_column(joined, column_names) is not None:
                hint = f" Columns are joined by a plus: --map {role}={joined}."
            problems.append(
                f"{flag}: no column {part!r}.{hint} "
                f"Columns: {join_names(map(quote, column_names))}."
            )
        elif role in NON_TEXT_ROLES and len(source_columns(column, column_names)) > 1:
            problems.append(f"{flag}: only texts can be joined. Name one column.")
        else:
            resolved[role] = column
    if problems:
        raise InputError(problems)
    return resolved


def _match(
    shape: FormatSpec, column_names: Sequence[str], mapping: Mapping[str, str]
) -> dict[str, str] | None:
    """Returns role → column, by `mapping`, then by name; None if `shape` lacks a mapped role."""
    if not mapping.keys() <= shape.roles.keys():
        return None
    by_name = {column.lower(): column for column in reversed(column_names)}
    by_name |= {column: column for column in column_names}
    matched: dict[str, str] = {}
    used = set(mapping.values())
    for role, names in shape.roles.items():
        candidates = (by_name[name] for name in names if name in by_name)
        column = mapping.get(role) or next((c for c in candidates if c not in used), None)
        if column:
            matched[role] = column
            used.add(column)
    return matched


@dataclass(frozen=True)
class _FormatSuggestion:
    column_names: Sequence[str]
    task: str
    shapes: Sequence[FormatSpec]
    mapping: Mapping[str, str]
    rows: Sequence[Row]
    _: KW_ONLY
    named: bool

    def describe(self) -> str:
        listing = f"Columns: {join_names(map(quote, self.column_names))}."
        formats = join_names(dict.fromkeys(shape.name for shape in self.shapes))
        suggestions = list(filter(None, map(self._suggest, self.shapes)))
        if not suggestions:
            flags = format_map_flags(self.mapping)
            return f"{flags}: no format of --task {self.task} has all of these. Formats: {formats}."
        flags = min(suggestions, key=lambda suggestion: suggestion[0])[1]
        media = [quote(name) for name in self.column_names if is_media_column(name)]
        if media and "=COLUMN" in flags:
            listing = f"{listing} {join_names(media)} contains no text."
        return (
            f"--task {self.task}: no format matches the columns. {listing} "
            f"Expected one of: {formats}. Map the columns: {flags}."
        )

    def _suggest(self, shape: FormatSpec) -> tuple[tuple[int, int, int], str] | None:
        matched = _match(shape, self.column_names, self.mapping)
        if matched is None:
            return None
        free = list(_unused(self.column_names, matched))
        missing = [role for role in shape.required if role not in matched]
        guesses: dict[str, str] = {}
        for role in missing:
            usable = rank_columns(free, role, self.rows)
            similar = (c for name in shape.required[role] for c in closest_matches(name, usable))
            if column := next(similar, None):
                guesses[role] = column
                free.remove(column)
        evidence = len(matched) + len(guesses)
        if not evidence and not shape.guessable and not self.named and not self._is_turns(shape):
            return None
        mapping, lacking = dict(self.mapping), 0
        for role in sorted(missing, key=lambda role: role not in _FIRST):
            column = guesses.get(role) or next(iter(rank_columns(free, role, self.rows)), None)
            if column in free:
                free.remove(column)
            lacking += column is None
            mapping[role] = column or "COLUMN"
        order = [*self.mapping, *(role for role in shape.required if role in mapping)]
        flags = format_map_flags(
            {role: column_for_flag(mapping[role], self.column_names) for role in order}
        )
        return (lacking, -evidence, len(missing) if evidence else 0), flags

    def _is_turns(self, shape: FormatSpec) -> bool:
        roles = list(shape.required)
        return bool(
            self.rows and shape.inner and rank_columns(self.column_names, roles[0], self.rows)
        )


_FIRST = ("label",)
"""Roles assigned first: the label is the column with the fewest values."""
