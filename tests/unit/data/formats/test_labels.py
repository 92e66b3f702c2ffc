"""Class names of a dataset."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ftlevel.config import DataConfig
from ftlevel.data.formats.examples import LabeledText, convert_rows
from ftlevel.data.formats.labels import LabelSet, check_labels, create_label_set
from ftlevel.data.prepare.loading import open_converter
from ftlevel.data.sources.table import Table
from ftlevel.errors import InputError
from ftlevel.tasks import TASKS

Labels = Sequence[str | int]


def make_examples(labels: Labels, names: tuple[str, ...] = ()) -> tuple[list[LabeledText], Table]:
    rows = [{"text": "t", "label": label} for label in labels]
    table = Table(
        rows, list(range(1, len(rows) + 1)), "x.csv", label_names={"label": names} if names else {}
    )
    return [LabeledText("t", None, label, index) for index, label in enumerate(labels)], table


@pytest.mark.parametrize(
    ("labels", "declared", "names"),
    [
        (["pos", "neg", "pos"], (), ("neg", "pos")),
        ([2, 0, 1, 0], (), ("0", "1", "2")),
        (["10", "9", "1"], (), ("1", "9", "10")),
        (["true", "false"], (), ("false", "true")),
        (["v1.0", "v2.0"], (), ("v1.0", "v2.0")),
        ([1, 0], ("neg", "pos"), ("neg", "pos")),
        ([2, 0], ("c", "b", "a"), ("c", "b", "a")),
        (["b", "c"], ("c", "b"), ("c", "b")),
    ],
)
def test_label_names(labels, declared, names):
    label_set = create_label_set(*make_examples(labels, declared), "label")
    assert label_set == LabelSet(names)
    assert len(label_set) == len(names)


@pytest.mark.parametrize("labels", [["3", "1", "2", 1, 2, 3], ["x", 1, "x", 1], [7, "2", "10"]])
def test_integer_labels_among_strings_are_names(labels):
    label_set = create_label_set(*make_examples(labels), "label")
    assert [label_set.names[label_set.id_of(label)] for label in labels] == list(map(str, labels))
    assert all(label in label_set for label in labels)
    assert 0 not in label_set


def test_label_ids():
    labels = LabelSet(("neg", "pos"))
    assert [labels.id_of(label) for label in ("neg", "pos", 0, 1)] == [0, 1, 0, 1]
    for unknown in ("x", 2, -1):
        assert unknown not in labels
        with pytest.raises(KeyError):
            labels.id_of(unknown)


@pytest.mark.parametrize(
    ("labels", "declared", "message"),
    [
        (
            ["pos"] * 1200,
            (),
            "x.csv: 'label' is 'pos' in all 1,200 rows; classification needs at least two "
            "classes. If the file is sorted by label, raise --max-samples; for another column, "
            "use --map label=COLUMN.",
        ),
        (
            [1, 2, 4],
            (),
            "x.csv: 'label' has the classes 1, 2, 4; numbers must be 0, 1, … without a gap, and "
            '0, 3 never occurs. Count from 0, or write names: "4" in quotes is one.',
        ),
        (
            [10**12, 10**12 + 1],
            (),
            "x.csv: 'label' has the classes 1000000000000, 1000000000001; numbers must be 0, 1, … "
            "without a gap, and 0, 1, 2, 3, … never occurs. Count from 0, or write names: "
            '"1000000000001" in quotes is one.',
        ),
        (
            [0, 1, -1, -1],
            (),
            "x.csv:3: 'label' is -1, and classes begin at 0. Such numbers mark rows without a "
            "label: remove these rows.",
        ),
        (
            ["4.5", "3", "1.0"],
            (),
            "x.csv:3: 'label' has decimals (1.0). Classes are names or whole numbers. To learn "
            "a quantity: --set data.problem_type=regression.",
        ),
        (
            [0, 1, 2],
            ("neg", "pos"),
            "x.csv:3: label 2 (1 row) is not one of the 2 declared classes (neg, pos). "
            "Remove these rows, or correct them.",
        ),
        (
            [0, 1, -1],
            ("neg", "pos"),
            "x.csv:3: label -1 (1 row) is not one of the 2 declared classes (neg, pos). "
            "Such numbers mark rows without a label: remove these rows.",
        ),
    ],
)
def test_invalid_labels_raise(labels, declared, message):
    with pytest.raises(InputError) as error:
        create_label_set(*make_examples(labels, declared), "label")
    assert str(error.value) == message


def test_label_missing_in_training_raises():
    labels = LabelSet(("a", "b"))
    check_labels(labels, *make_examples(["a", "a"]))
    with pytest.raises(InputError) as error:
        check_labels(labels, *make_examples(["a", "c", "d", "c"]))
    assert str(error.value) == (
        "x.csv:2: label 'c' (2 rows), 'd' (1 row) are not a class of the training rows (a, b). "
        "Remove these rows, or correct them, or train with a list of all classes: --set "
        "'data.labels=[…]'."
    )


@pytest.mark.parametrize(
    ("task", "role", "numbers", "names"),
    [
        ("text-classification", "label", 1, "pos"),
        ("text-classification", "label", -1, -1),
        ("text-classification", "label", [1, 0], ("pos", "neg")),
        ("token-classification", "tags", [0, 1], ("neg", "pos")),
    ],
)
def test_declared_class_numbers_become_names(task, role, numbers, names):
    rows = [{"text": "a b", "tokens": ["a", "b"], role: numbers}]
    table = Table(rows, [1], "x.csv", label_names={role: ("neg", "pos")})
    config = DataConfig()
    format_ = TASKS[task].get_format(["tokens" if role == "tags" else "text", role], config)
    format_, _ = TASKS[task].update_format(format_, table, config)
    [example], bad = convert_rows(table, format_)
    assert not bad
    assert getattr(example, role) == names


@pytest.mark.parametrize("labels", [LabelSet(("0", "1")), None])
def test_numbers_stay_if_known_classes_are_numbers(labels):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    table = Table(rows, [1, 2], "x.csv", label_names={"label": ("neg", "pos")})
    config = DataConfig(labels=("0", "1") if labels is None else ())
    convert, _ = open_converter(table, config, TASKS["text-classification"])
    held_out, examples = convert.convert_held_out("validation", table, labels)
    assert [example.label for example in examples] == [1, 0]
    assert create_label_set(examples, held_out, "label", ("0", "1")).names == ("0", "1")
    named = LabelSet(("pos", "neg"))
    convert, _ = open_converter(table, DataConfig(), TASKS["text-classification"])
    _, examples = convert.convert_held_out("validation", table, named)
    assert [named.id_of(example.label) for example in examples] == [0, 1]
