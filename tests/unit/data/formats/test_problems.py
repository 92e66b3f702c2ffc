from __future__ import annotations

from typing import Any

import pytest

from ftlevel.config import DataConfig
from ftlevel.data.formats.detect import Format
from ftlevel.data.formats.examples import LabeledText, create_labeled_text, to_examples
from ftlevel.data.formats.labels import check_labels, choose_problem_type, create_label_set
from ftlevel.data.sources.table import Table
from ftlevel.errors import InputError
from ftlevel.tasks import TASKS

SINGLE, MULTI, REGRESSION = (
    "single_label_classification", "multi_label_classification", "regression",
)  # fmt: skip


def make_table(*labels: Any) -> Table:
    rows = [{"text": "t", "label": label} for label in labels]
    return Table(rows, list(range(1, len(rows) + 1)), "x.jsonl")


def convert(problem: Any, *labels: Any) -> list[Any]:
    columns = {"text": "text", "label": "label"}
    config = DataConfig(problem_type=problem)
    shape = Format("text-classification", "", create_labeled_text, columns)
    shape, _ = TASKS["text-classification"].update_format(shape, make_table(*labels), config)
    return [e.label for e in to_examples(make_table(*labels), shape) if isinstance(e, LabeledText)]


def detect(labels):
    problem, reason = choose_problem_type(make_table(*labels), "label")
    assert reason.startswith("auto")
    return problem


@pytest.mark.parametrize(
    "labels", [["a", "b"], [0, 1], [1.0, 2.0], [True, False], ["1.5", "x"], ["nan", "1"]]
)
def test_names_and_whole_numbers_are_single_labels(labels):
    assert detect(labels) == SINGLE


def test_decimals_are_regression_and_lists_are_multi_labels():
    assert detect([1, 2.5]) == detect(["1.5", "2"]) == REGRESSION
    assert detect([["a"], []]) == MULTI


def test_explicit_problem_type_and_declared_names_take_precedence():
    assert choose_problem_type(make_table(1, 2), "label", "regression") == (REGRESSION, "")
    declared = Table([{"label": 0.5}], [1], "x", label_names={"label": ("a", "b")})
    assert choose_problem_type(declared, "label")[0] == SINGLE


def test_regression_labels():
    assert convert(REGRESSION, 1, -2.5, "3.25") == [1.0, -2.5, 3.25]
    for invalid, reason in (
        ("x", "'label' is 'x', not a number"),
        (10**400, "'label' is 10+, not a number"),
        (float("inf"), "'label' is inf, not a finite number"),
        (True, "'label' is true or false, not a number"),
        (None, "'label' is null, not a number"),
    ):
        with pytest.raises(InputError, match=f"x.jsonl:1: {reason}"):
            convert(REGRESSION, invalid)


def test_multi_labels():
    assert convert(MULTI, ["b", "a"], [], ["c"]) == [("b", "a"), (), ("c",)]
    for invalid, reason in (
        ("a", "'label' is a string, not a list of labels"),
        ([0, 1, 0], "'label' lists a label twice"),
        (["a", None], "label 2 of 'label' is null"),
    ):
        with pytest.raises(InputError, match=f"x.jsonl:1: {reason}"):
            convert(MULTI, invalid)


def test_label_set_of_multi_labels():
    rows = make_table(["b", "a"], [], ["c"])
    examples = [LabeledText("t", None, tuple(row["label"]), i) for i, row in enumerate(rows.rows)]
    labels = create_label_set(examples, rows, "label")
    assert labels.names == ("a", "b", "c")
    with pytest.raises(InputError, match=r"x.jsonl:1: label 'd' .* is not a class of the training"):
        check_labels(labels, [LabeledText("t", None, ("a", "d"), 0)], rows)
