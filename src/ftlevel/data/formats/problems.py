"""What the label of a text is: one class, several, or a quantity."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from ftlevel.data.sources.table import Row, Table

ProblemType: TypeAlias = Literal[
    "single_label_classification", "multi_label_classification", "regression"
]


def choose_problem_type(
    table: Table, column: str, wish: ProblemType | Literal["auto"] = "auto"
) -> tuple[ProblemType, str]:
    """Return the problem type of a label column, and why.

    Lists, and JSON lists in the text of all rows, are several labels a row. Numbers with a fraction
    are quantities. Everything else is a class: whole numbers may be grades as well, which nobody
    but the user can know.
    """
    if wish != "auto":
        return wish, ""
    values = [_value(row, column) for row in table.rows]
    if any(type(value) is list for value in values):
        return "multi_label_classification", f"auto: {column!r} holds lists"
    if values and all(map(_is_json_list, values)):
        return "multi_label_classification", f"auto: {column!r} holds lists as JSON text"
    if column not in table.label_names and _has_quantities(values):
        return "regression", f"auto: {column!r} holds numbers with a fraction"
    return "single_label_classification", "auto: one name or whole number a row"


def _value(row: Row, column: str) -> Any:
    value: Any = row
    for part in (column,) if column in row else column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _is_json_list(value: Any) -> bool:
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return False
    try:
        return type(json.loads(value)) is list
    except ValueError:
        return False


def _has_quantities(values: Sequence[Any]) -> bool:
    """Tell whether all values are numbers, as text too, and one is not whole."""
    try:
        numbers = [float(value) for value in values if value is not None]
    except (TypeError, ValueError):
        return False
    return any(math.isfinite(n) and not n.is_integer() for n in numbers)
