"""Which column of a table means what for a task.

A table has columns; a task wants roles ("document", "summary"). A format gives each role a column:
by the names that published data sets use, or by the user's `--map`. `examples` converts the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, TypeAlias

from ftlevel.data.formats.columns import (
    WHOLE,
    column_for_flag,
    names_media,
    parts_of,
    rank_columns,
    resolve_column,
    write_flags,
)
from ftlevel.data.sources.table import Row
from ftlevel.errors import InputError, did_you_mean, listing, nearest, quote

Names: TypeAlias = Mapping[str, tuple[str, ...]]
Build: TypeAlias = Callable[[Any], Any]
"""The `Roles` of a row → the example that it is; raises `Unusable` where it cannot be one."""


@dataclass(frozen=True)
class Format:
    """What the columns of a table are used for.

    Attributes:
        task: the task the format was found for.
        name: of the shape, such as "prompt + completion".
        build: makes the example that a row becomes.
        columns: the column of each role; "answers.text" reaches into an object.
        unused: the columns that no role takes.
        inner: what the data calls the parts of a turn, and who speaks.
        options: what the task read off the columns beside, such as a problem type.
    """

    task: str
    name: str
    build: Build
    columns: Mapping[str, str]
    unused: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    inner: Mapping[str, str] = field(default_factory=dict)

    @property
    def description(self) -> str:
        """Which column is used for what, in one line."""
        used = ", ".join(
            quote(column) if role == column else f"{role} from {quote(column)}"
            for role, column in self.columns.items()
        )
        used += "".join(f", {role} is {name!r}" for role, name in self.inner.items())
        idle = f"; not used: {listing(map(quote, self.unused))}" if self.unused else ""
        return f"{self.name}: {used}{idle}"


def why(columns: Mapping[str, str], mapping: Mapping[str, str], name: str | None) -> str:
    """Return why `columns` are used so: the user's word, or their names where these differ."""
    if mapping or name:
        flags = (("--map", mapping), ("--format", name))
        return "by " + " and ".join(flag for flag, given in flags if given)
    return "" if all(role == column for role, column in columns.items()) else "by their names"


@dataclass(frozen=True)
class Wish:
    """What the user says of the columns.

    Attributes:
        mapping: column by role, as given with `--map`; it goes before every known name.
        name: the only format to try, as given with `--format`.
        aim: what the columns are to say, for the error.
    """

    mapping: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None
    aim: str = "learn"


@dataclass(frozen=True)
class Shape:
    """A set of roles, each with the column names that it is known by, the best first.

    Attributes:
        name: such as "prompt + completion".
        build: as of `Format`.
        required: roles without which it is another shape.
        optional: roles that are taken where they are there.
        guessable: whether it is suggested also for columns whose names say nothing.
        inner: what `--map` can name inside of a column, and so is no column.
    """

    name: str
    build: Build
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
        """Every role."""
        return {**self.required, **self.optional}


_OTHER_NAMES = {
    "sharegpt": "conversations",
    "openai": "messages",
    "alpaca": "instruction-output",
    "squad": "context-question-answers",
    "plain": "text",
}
"""Names that people have for formats → ours."""


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
"""What people call a role → the roles of tasks that may be meant, for those that have no such."""


class NoFormatError(InputError):
    """No shape of a task fits the columns, of which another task may know what to make."""


def detect_format(
    columns: Sequence[str],
    task: str,
    shapes: Sequence[Shape],
    wish: Wish | None = None,
    rows: Sequence[Row] = (),
) -> Format:
    """Find the column of each role that `task` wants.

    Args:
        columns: the names that the table has.
        task: its name.
        shapes: what it can make of columns; of those that fit, the first is taken.
        wish: what the user says.
        rows: some of the table, by which an error proposes what may be meant.

    Raises:
        NoFormatError: nobody said what the columns are, and no shape fits.
        InputError: the shape that was asked for does not fit, or the mapping names what is not
            there.
    """
    wish = wish or Wish()
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
            used = {part for column in found.values() for part in parts_of(column, columns)}
            unused = tuple(name for name in columns if name not in used)
            return Format(task, shape.name, shape.build, found, unused, inner=inside)
    named = len(shapes) < len(known)
    error = InputError if wanted or named else NoFormatError
    advice = _Advice(columns, task, shapes, wanted, rows, named=named)
    raise error(advice.describe(wish.aim))


def _role(name: str, shapes: Sequence[Shape]) -> str:
    """Return the role of `shapes` that is called `name`, or that is meant by it."""
    roles = {role for shape in shapes for role in shape.roles}
    if name in roles:
        return name
    return next((role for role in _OTHER_ROLES.get(name, ()) if role in roles), name)


def fits(columns: Sequence[str], shapes: Sequence[Shape]) -> bool:
    """Whether `columns` have every role of one of `shapes`."""
    return any((_match(shape, columns, {}) or {}).keys() >= set(shape.required) for shape in shapes)


def _pick_shapes(shapes: Sequence[Shape], name: str, task: str) -> tuple[Shape, ...]:
    """Return the shapes of the format called `name`, such as prompt-completion or squad."""
    wish = name.strip().lower().replace("_", "-")
    wish = _OTHER_NAMES.get(wish, wish)
    found = tuple(shape for shape in shapes if shape.slug == wish)
    if not found:
        names = list(dict.fromkeys(shape.slug for shape in shapes))
        raise InputError(
            f"--format {name}: --task {task} has no such format.{did_you_mean(wish, names)} "
            f"It has: {listing(names)}."
        )
    return found


def _resolve_mapping(
    columns: Sequence[str], task: str, shapes: Sequence[Shape], mapping: Mapping[str, str]
) -> dict[str, str]:
    """Return `mapping` with the columns that are meant.

    Raises:
        InputError: a role is none of the task's, or a column is not there.
    """
    roles = list(dict.fromkeys(role for shape in shapes for role in shape.roles))
    problems = []
    found = {}
    for role, wish in mapping.items():
        column = resolve_column(wish, columns)
        if _role(role, shapes) not in roles:
            problems.append(
                f"--map {role}={wish}: --task {task} has no {role!r}."
                f"{did_you_mean(role, roles)} It has: {listing(roles)}."
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
                f"Columns: {listing(map(quote, columns))}."
            )
        elif role in WHOLE and len(parts_of(column, columns)) > 1:
            problems.append(f"--map {role}={wish}: only texts can be joined. Name one column.")
        else:
            found[role] = column
    if problems:
        raise InputError(problems)
    return found


def _match(
    shape: Shape, columns: Sequence[str], mapping: Mapping[str, str]
) -> dict[str, str] | None:
    """Return the columns found for the roles of `shape`; None if it lacks a mapped role."""
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
class _Advice:
    """What is said of columns that fit no shape: what is there, what is wanted, and what is near.

    Attributes:
        columns: the names that the table has.
        task: its name.
        shapes: what it can make of columns.
        mapping: column by role, as far as the user said it.
        rows: some of the table.
        named: whether the user named one of the shapes.
    """

    columns: Sequence[str]
    task: str
    shapes: Sequence[Shape]
    mapping: Mapping[str, str]
    rows: Sequence[Row]
    _: KW_ONLY
    named: bool

    def describe(self, aim: str) -> str:
        """Return the message, with the flags that would make the nearest shape fit."""
        there = f"Columns: {listing(map(quote, self.columns))}."
        wants = listing(dict.fromkeys(shape.name for shape in self.shapes))
        offers = [offer for shape in self.shapes if (offer := self._offer(shape)) is not None]
        if not offers:
            pairs = write_flags(self.mapping)
            return f"{pairs}: no format of --task {self.task} has all of these. Formats: {wants}."
        flags = min(offers, key=lambda offer: offer[0])[1]
        media = [quote(name) for name in self.columns if names_media(name)]
        if media and "=COLUMN" in flags:
            there = f"{there} {listing(media)} holds no text, from which ftlevel learns."
        return (
            f"--task {self.task}: the columns do not say what to {aim}. {there} "
            f"Wanted is one of: {wants}. Say which is which: {flags}."
        )

    def _offer(self, shape: Shape) -> tuple[tuple[int, int, int], str] | None:
        """Return how far `shape` is from the columns, and the flags that would make it fit.

        None for one that nothing speaks for, unless the user named it.
        """
        found = _match(shape, self.columns, self.mapping)
        if found is None:
            return None
        used = {part for column in found.values() for part in parts_of(column, self.columns)}
        free = [name for name in self.columns if name not in used]
        missing = [role for role in shape.required if role not in found]
        guesses: dict[str, str] = {}
        for role in missing:
            able = rank_columns(free, role, self.rows)
            close = [hit for name in shape.required[role] for hit in nearest(name, able)]
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
        flags = write_flags({role: column_for_flag(pairs[role], self.columns) for role in order})
        return (lacking, -evidence, len(missing) if evidence else 0), flags

    def _is_turns(self, shape: Shape) -> bool:
        """Tell whether a column holds what the shape's only role wants, lists of objects."""
        roles = list(shape.required)
        return bool(self.rows and shape.inner and rank_columns(self.columns, roles[0], self.rows))


_FIRST = ("label",)
"""Roles whose column is looked for first: the one with the fewest values is no text."""
