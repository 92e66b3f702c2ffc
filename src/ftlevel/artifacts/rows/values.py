"""A value as JSON or as the cell of a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(row: Mapping[str, Any]) -> str:
    """Return a row as a line of JSON; what JSON has no word for is text, NaN and infinity null."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_as_text)
    except ValueError:
        return json.dumps(_finite(row), ensure_ascii=False, default=_as_text)


def to_cell(value: Any) -> str:
    """Return a value as the cell of a table: nothing for null, JSON for lists and objects."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | dict | tuple):
        return json.dumps(value, ensure_ascii=False, default=_as_text)
    return repr(value) if isinstance(value, int | float) else _as_text(value)


def _as_text(value: Any) -> str:
    """Return a date, a decimal or bytes as text."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
