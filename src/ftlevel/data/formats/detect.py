"""Which column of a table means what for a task.

A table has columns; a task wants roles ("document", "summary"). A format gives each role a column:
by the names that published data sets use, or by the user's `--map`. `examples` converts the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ftlevel.errors import InputError, did_you_mean, listing, nearest

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
        options: what the task read off the columns beside, such as a problem type.
    """

    task: str
    name: str
    build: Build
    columns: Mapping[str, str]
    unused: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def description(self) -> str:
        """Which column is used for what, in one line."""
        used = ", ".join(
            repr(column) if role == column else f"{role} from {column!r}"
            for role, column in self.columns.items()
        )
        idle = f"; not used: {listing(repr(name) for name in self.unused)}" if self.unused else ""
        return f"{self.name}: {used}{idle}"


@dataclass(frozen=True)
class Shape:
    """A set of roles, each with the column names that it is known by, the best first.

    Attributes:
        name: such as "prompt + completion".
        build: as of `Format`.
        required: roles without which it is another shape.
        optional: roles that are taken where they are there.
        guessable: whether it is suggested also for columns whose names say nothing.
    """

    name: str
    build: Build
    required: Names
    optional: Names = field(default_factory=dict)
    guessable: bool = True

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
    mapping: Mapping[str, str] | None = None,
    name: str | None = None,
) -> Format:
    """Find the column of each role that `task` wants.

    Args:
        columns: the names that the table has.
        task: its name.
        shapes: what it can make of columns; of those that fit, the first is taken.
        mapping: column by role, as given with `--map`; it goes before every known name.
        name: the only format to try, as given with `--format`.

    Raises:
        NoFormatError: nobody said what the columns are, and no shape fits.
        InputError: the shape that was asked for does not fit, or the mapping names what is not
            there.
    """
    known = shapes
    if name is not None:
        shapes = _pick_shapes(shapes, name, task)
    wanted = {_role(role, shapes): column for role, column in (mapping or {}).items()}
    _check_mapping(columns, task, shapes, wanted)
    for shape in shapes:
        found = _match(shape, columns, wanted)
        if found is not None and all(role in found for role in shape.required):
            used = {column.partition(".")[0] for column in found.values()} | set(found.values())
            unused = tuple(name for name in columns if name not in used)
            return Format(task, shape.name, shape.build, found, unused)
    named = len(shapes) < len(known)
    error = InputError if wanted or named else NoFormatError
    raise error(_describe_no_format(columns, task, shapes, wanted, named=named))


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


def _check_mapping(
    columns: Sequence[str], task: str, shapes: Sequence[Shape], mapping: Mapping[str, str]
) -> None:
    """Raise unless each role of `mapping` is one of the task, and each column is there."""
    roles = list(dict.fromkeys(role for shape in shapes for role in shape.roles))
    problems = []
    for role, column in mapping.items():
        if role not in roles:
            problems.append(
                f"--map {role}={column}: --task {task} has no {role!r}."
                f"{did_you_mean(role, roles)} It has: {listing(roles)}."
            )
        if column not in columns and column.partition(".")[0] not in columns:
            problems.append(
                f"--map {role}={column}: no column {column!r}.{did_you_mean(column, columns)} "
                f"Columns: {listing(repr(name) for name in columns)}."
            )
    if problems:
        raise InputError(problems)


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


def _describe_no_format(
    columns: Sequence[str],
    task: str,
    shapes: Sequence[Shape],
    mapping: Mapping[str, str],
    *,
    named: bool,
) -> str:
    """Return the message for columns that fit no shape: what is there, wanted, and near."""
    there = f"Columns: {listing(repr(name) for name in columns)}."
    wants = listing(dict.fromkeys(shape.name for shape in shapes))
    offers = [
        offer
        for shape in shapes
        if (offer := _suggest(shape, columns, mapping, wished=named)) is not None
    ]
    if not offers:
        pairs = " ".join(f"--map {role}={column}" for role, column in mapping.items())
        return f"{pairs}: no format of --task {task} has all of these. Formats: {wants}."
    flags = min(offers, key=lambda offer: offer[0])[1]
    return (
        f"--task {task}: the columns do not say what to learn. {there} "
        f"Wanted is one of: {wants}. Say which is which: {flags}."
    )


def _suggest(
    shape: Shape, columns: Sequence[str], mapping: Mapping[str, str], *, wished: bool
) -> tuple[tuple[int, int, int], str] | None:
    """Return how far `shape` is from `columns`, and the flags that would make it fit.

    None for one that nothing speaks for, unless it is `wished` for by name.
    """
    found = _match(shape, columns, mapping)
    if found is None:
        return None
    free = [name for name in columns if name not in found.values()]
    missing = [role for role in shape.required if role not in found]
    guesses: dict[str, str] = {}
    for role in missing:
        close = [hit for name in shape.required[role] for hit in nearest(name, free)]
        if close:
            guesses[role] = close[0]
            free.remove(close[0])
    evidence = len(found) + len(guesses)
    if not evidence and not shape.guessable and not wished:
        return None
    lacking = max(0, len(missing) - len(guesses) - len(free))
    pairs = dict(mapping)
    for role in missing:
        pairs[role] = guesses.get(role) or (free.pop(0) if free else "COLUMN")
    flags = " ".join(f"--map {role}={column}" for role, column in pairs.items())
    return (lacking, -evidence, len(missing) if evidence else 0), flags
