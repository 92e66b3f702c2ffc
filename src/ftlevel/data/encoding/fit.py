"""Apply the length limit to encoded rows: raise, drop, truncate or split.

Every change is counted for the report. Answers are never truncated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.data.encoding.store import map_rows, row_lengths, select_rows
from ftlevel.errors import InputError

MAX_DROP_RATIO = 0.01
"""Maximum share of rows that `--max-length auto` may drop because of a bound."""


@dataclass(frozen=True)
class LengthBounds:
    """Upper bounds on the row length in tokens, from model positions and memory."""

    positions: int | None = None
    memory: int | None = None

    @property
    def tightest(self) -> tuple[int | None, str]:
        """(bound, name for messages) of the smaller bound; the bound is None if there is none."""
        if self.memory is not None and (self.positions is None or self.memory < self.positions):
            return self.memory, "this machine's memory"
        return self.positions, "the model's positions"

    def check(self, max_length: int) -> None:
        """Raise `InputError` if `max_length` exceeds the positions of the model."""
        if self.positions is not None and max_length > self.positions:
            raise InputError(
                f"--max-length {max_length:,} is beyond the model's {self.positions:,} positions. "
                f"Use at most {self.positions:,}."
            )


@dataclass(frozen=True)
class FittedRows:
    """Rows within the length limit, and counts of the changes.

    Attributes:
        long_prompts: indices of examples whose prompt alone exceeds `max_length`.
        lost: indices of examples dropped because only cutting the answer would make them fit.
        overlong: action on long rows; "drop" if "auto" dropped a few of them instead of raising.
        stops: message of an error that is not raised, because a preview drops the rows instead.
    """

    rows: Sequence[Encoded]
    max_length: int
    reason: str
    dropped: int = 0
    shortened: int = 0
    split: int = 0
    long_prompts: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    overlong: str = "error"
    shortened_at: str = ""
    stops: str = ""
    digests: Any = None


def fit_rows(
    rows: Sequence[Encoded],
    max_length: int | str,
    bounds: LengthBounds,
    overlong: str,
    where: Callable[[int], str],
) -> FittedRows:
    """Truncate, split or drop rows longer than `max_length`, or raise, as `overlong` says.

    `max_length` is in tokens; "auto" is the longest row, within `bounds`. `overlong` is error,
    drop, truncate, truncate-prompt or split. With "auto", error only raises if over 1 % of the rows
    are too long, else these are dropped. `where` returns the `file:line` of an example. Raises
    `InputError` also if `max_length` exceeds the model's positions.
    """
    lengths = row_lengths(rows)
    longest = int(lengths.max())
    limit, reason = _resolve_length(max_length, longest, bounds)
    long_rows = [rows[i] for i in np.flatnonzero(lengths > limit).tolist()]
    if not long_rows:
        return FittedRows(rows, limit, reason, overlong=overlong)
    if overlong == "error":
        if max_length != "auto" or len(long_rows) > MAX_DROP_RATIO * len(rows):
            raise InputError(_too_long(long_rows, len(rows), limit, longest, reason, bounds, where))
        overlong = "drop"
        lost = (
            "1 row is" if len(long_rows) == 1 else f"{len(long_rows):,} of {len(rows):,} rows are"
        )
        reason += f"; {lost} longer, up to {longest:,}, and dropped"
    long_prompts = tuple(row.row for row in long_rows if (prompt_length(row) or 0) > limit)
    if overlong != "drop":
        return _change_rows(rows, limit, reason, overlong, long_prompts)
    fitting = select_rows(rows, np.flatnonzero(lengths <= limit))
    return FittedRows(
        fitting, limit, reason, len(long_rows), long_prompts=long_prompts, overlong="drop"
    )


def check_not_empty(fitted: FittedRows, rows: Sequence[Encoded]) -> None:
    """Raise `InputError` if all rows were dropped because they exceed the maximum length."""
    if not len(fitted.rows):
        raise InputError(
            f"no row is left within --max-length {fitted.max_length:,}: the shortest has "
            f"{int(row_lengths(rows).min()):,} tokens. Raise --max-length."
        )


def _resolve_length(max_length: int | str, longest: int, bounds: LengthBounds) -> tuple[int, str]:
    if isinstance(max_length, int):
        bounds.check(max_length)
        return max_length, ""
    bound, name = bounds.tightest
    if bound is None or longest <= bound:
        return longest, "auto: the longest row"
    return bound, f"auto: {name}"


def _change_rows(
    rows: Sequence[Encoded], limit: int, reason: str, overlong: str, long_prompts: tuple[int, ...]
) -> FittedRows:
    is_split = overlong == "split"
    cut = split_text if is_split else _cut_prompt
    lost: list[int] = []
    changed = 0

    def change(row: Encoded) -> list[Encoded]:
        nonlocal changed
        if row.length <= limit:
            return [row]
        pieces = cut(row, limit)
        lost.extend([] if pieces else [row.row])
        changed += bool(pieces)
        return pieces

    has_prompt = prompt_length(rows[0]) is not None
    return FittedRows(
        map_rows(rows, change),
        limit,
        reason,
        dropped=len(lost),
        shortened=0 if is_split else changed,
        split=changed if is_split else 0,
        long_prompts=long_prompts,
        lost=tuple(lost),
        overlong=overlong,
        shortened_at="the beginning of the prompt" if has_prompt else "the end of the text",
    )


def _too_long(
    long_rows: Sequence[Encoded],
    total: int,
    limit: int,
    longest: int,
    reason: str,
    bounds: LengthBounds,
    where: Callable[[int], str],
) -> str:
    worst = max(long_rows, key=lambda row: row.length)
    fix = "Pass"
    if reason.endswith("memory"):
        fix = "Use --gradient-checkpointing or a smaller model, or pass"
    elif bounds.positions is None or longest <= bounds.positions:
        fix = f"Raise --max-length to {longest:,} to keep all of them, or pass"
    alternative = "split" if prompt_length(worst) == 0 else "truncate-prompt"
    alternative = "truncate" if worst.truncated(limit) is not None else alternative
    limited = f" ({reason.removeprefix('auto: ')})" if reason else ""
    return (
        f"{len(long_rows):,} of {total:,} rows are longer than {limit:,} tokens{limited}; the "
        f"longest has {longest:,} ({where(worst.row)}). {fix} --overlong drop or {alternative}."
    )


def _cut_prompt(row: Encoded, limit: int) -> list[Encoded]:
    """Returns [row] cut to `limit` tokens; [] if cutting the prompt is not enough.

    The first token, which may be BOS, is kept. A row without a prompt is truncated.
    """
    surplus = row.length - limit
    prompt = prompt_length(row)
    if prompt is None or not isinstance(row.labels, list):
        return [truncate_row(row, limit)]
    if surplus < prompt - 1 and row.input_ids[0] == row.input_ids[1 + surplus]:
        surplus += 1
    if surplus > prompt - 1:
        return []
    return [row.without(surplus)]


def prompt_length(row: Encoded) -> int | None:
    """Returns the number of tokens before the first label; None if labels are not per token."""
    labels = row.labels
    if not isinstance(labels, list) or len(labels) != len(row.input_ids):
        return None
    return next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))


def truncate_row(row: Encoded, limit: int) -> Encoded:
    """Returns `row` cut to `limit` tokens; the last one is kept, as it may be SEP or EOS."""
    if row.length <= limit:
        return row
    if (truncated := row.truncated(limit)) is not None:
        return truncated

    def cut(values: list[int]) -> list[int]:
        return values[: limit - 1] + values[-1:]

    extras = {name: cut(values) for name, values in row.extras.items()}
    return replace(row, input_ids=cut(row.input_ids), extras=extras)


def split_text(row: Encoded, limit: int) -> list[Encoded]:
    """Split a plain text into pieces of at most `limit` tokens; [] for a row with a prompt."""
    if not isinstance(row.labels, list) or IGNORED in row.labels or limit == 1:
        return []
    ids = row.input_ids
    parts = (ids[start : start + limit] for start in range(0, len(ids), limit))
    pieces = [replace(row, input_ids=part, labels=list(part)) for part in parts]
    if len(pieces[-1].input_ids) == 1:
        pieces[-1] = replace(row, input_ids=ids[-2:], labels=[IGNORED, ids[-1]])
    return pieces


def fit_targets(
    rows: Sequence[Encoded], limit: int, overlong: str, where: Callable[[int], str]
) -> tuple[Sequence[Encoded], int]:
    """Returns the rows with a target of at most `limit` tokens, and the number of rows dropped.

    Raises `InputError`, naming `where(row)`, if a target is longer and `overlong` is not drop.
    """
    sizes = np.fromiter((_target_length(row) for row in rows), dtype=np.int64, count=len(rows))
    long_rows = np.flatnonzero(sizes > limit)
    if not len(long_rows):
        return rows, 0
    worst = rows[int(np.argmax(sizes))]
    if overlong != "drop":
        raise InputError(
            f"{len(long_rows):,} of {len(rows):,} targets are longer than {limit:,} tokens; the "
            f"longest has {worst.supervised:,} ({where(worst.row)}). Raise it by --set "
            f"data.max_target_length={worst.supervised}, or pass --overlong drop."
        )
    return select_rows(rows, np.flatnonzero(sizes <= limit)), len(long_rows)


def _target_length(row: Encoded) -> int:
    return max(len(b.labels) if isinstance(b.labels, list) else 0 for b in row.sequences)
