"""Rows that were scored, as lines of a file: what was asked, what was said, and what is true."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ftlevel.evaluation.intervals import PerRow
from ftlevel.evaluation.scoring import Evaluator
from ftlevel.task import TokenObjective

_LONGEST = 2_000  # letters of a text


def row_lines(
    record: PerRow,
    labels: Sequence[str],
    where: Callable[[int], str],
    *,
    base: PerRow | None = None,
    evaluator: Evaluator | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield a line an example, in the order of the rows.

    Args:
        record: what was scored.
        labels: names of the classes or tags.
        where: says where a row is from, by its index.
        base: the same rows, scored by another model.
        evaluator: what scored them, where their texts are wanted too.
    """
    texts = {} if evaluator is None else texts_of(evaluator)
    written = {item.row: item for item in record.written}
    base_written = {item.row: item for item in base.written} if base else {}
    for row in sorted(record.units):
        unit = record.units[row]
        line: dict[str, Any] = {"row": row, "where": where(row)}
        line["loss"] = unit.loss / unit.targets if unit.targets else None
        line |= {**texts.get(row, {}), **unit.meter.describe(labels)}
        if row in written:
            line |= {"predicted": written[row].text, "true": written[row].reference}
        if base is not None and row in base.units:
            other = base.units[row]
            line["base_loss"] = other.loss / other.targets if other.targets else None
            said = other.meter.describe(labels)
            line |= {f"base_{key}": value for key, value in said.items() if key != "true"}
            if row in base_written:
                line["base_predicted"] = base_written[row].text
        yield line


def texts_of(evaluator: Evaluator) -> dict[int, dict[str, str]]:
    """Return what each row asks, and its true answer, in words; of a long one the first part."""
    writes = isinstance(evaluator.objective, TokenObjective) and evaluator.kind != "encoder"
    found: dict[int, dict[str, str]] = {}
    for row in evaluator.rows:
        if row.row in found:  # another window of it, or another piece
            continue
        first, *others = row.branches
        answered = evaluator.answer_text(first) if writes or others else ""
        texts = {"input": evaluator.prompt_text(first) if answered else evaluator.text(first)}
        if len(others) == 1:
            other = evaluator.answer_text(others[0]) or evaluator.text(others[0])
            texts = {"chosen": answered or texts["input"], "rejected": other} | (
                {"input": texts["input"]} if answered else {}
            )
        elif answered:
            texts["true"] = answered
        found[row.row] = {name: text[:_LONGEST] for name, text in texts.items()}
    return found
