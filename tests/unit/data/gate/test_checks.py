"""Token checks on small rows: exactly the faulty rows are found."""

from __future__ import annotations

import numpy as np
import pytest

from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.data.encoding.spans import Window
from ftlevel.data.encoding.store import rows_to_batches, write_store
from ftlevel.data.gate import Finding, checks, explain_stop
from ftlevel.data.gate.checks import FlatRows, get_example_mask
from ftlevel.tasks import TASKS

_ = IGNORED
BOS, EOS = 1, 2


def make_flat_rows(*rows: tuple[list[int], list[int]]) -> FlatRows:
    return FlatRows.of([Encoded(ids, labels, i) for i, (ids, labels) in enumerate(rows)])


def get_indices(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(mask).tolist()


def test_example_mask_in_memory_and_from_store(tmp_path):
    rows = [Encoded([5], [5], example) for example in [0, 0, 2, *range(3, 2_003)]]
    keep = np.ones(len(rows), dtype=bool)
    keep[[0, 2, 1_500]] = False
    expected = np.ones(2_004, dtype=bool)
    expected[[1, 2, rows[1_500].row, 2_003]] = False
    store = write_store(tmp_path / "rows.arrow", rows_to_batches(rows))
    for source in (rows, store):
        assert np.array_equal(get_example_mask(source, keep, 2_004), expected)
    source = store.take(np.arange(1, len(rows)))
    assert np.array_equal(get_example_mask(source, keep[1:], 2_004), expected)


def test_unsupervised_rows():
    flat = make_flat_rows(([5, 6], [_, 6]), ([5, 6], [_, _]), ([], []))
    assert get_indices(flat.supervised() == 0) == [1, 2]


@pytest.mark.parametrize(
    ("labels", "is_missing"),
    [
        ([_, 7, EOS], False),
        ([_, 7, 8], True),
        ([_, 7, EOS, _, _], False),  # white space after the end of the turn
        ([_, 7, 9, _, 7, EOS], True),  # the first of two answers has no end
        ([_, 7, EOS, _, 7, EOS], False),
        ([_, _, _], False),  # found by another check
        ([_, EOS, 7], True),
    ],
)
def test_missing_eos_in_any_answer(labels, is_missing):
    complete = [_, 7, EOS]
    flat = make_flat_rows((complete, complete), (labels, labels), (complete, complete))
    assert get_indices(checks.has_missing_eos(flat, {EOS})) == [1] * is_missing


def test_missing_eos_checks_last_piece_of_split_text():
    pieces = [Encoded([7, 8], [7, 8], 0), Encoded([9, EOS], [9, EOS], 0), Encoded([7], [7], 1)]
    assert get_indices(checks.has_missing_eos(FlatRows.of(pieces), {EOS})) == [2]


def test_double_bos():
    rows = [([BOS, BOS, 5], [_] * 3), ([BOS, 5, BOS], [_] * 3), ([BOS], [_]), ([], [])]
    flat = make_flat_rows(*rows)
    assert get_indices(checks.has_double_bos(flat, BOS)) == [0]
    assert get_indices(checks.has_double_bos(flat, None)) == []


def test_invalid_token_ids():
    flat = make_flat_rows(([9], [9]), ([10], [_]), ([3], [10]), ([-1], [_]))
    assert get_indices(checks.has_invalid_ids(flat, 10, token_labels=True)) == [1, 2, 3]
    assert get_indices(checks.has_invalid_ids(flat, 10, token_labels=False)) == [1, 3]


def test_answer_outside_all_windows():
    rows = [((0, 0), 0), ((3, 4), 0), ((0, 0), 1), ((0, 0), 1), ((0, 0), 2)]
    windows = [Window([1], at, n, {}, "", (("x", 4),) if n < 2 else ()) for at, n in rows]
    assert get_indices(TASKS["question-answering"].check_rows(windows)["answer_cut"]) == [2, 3]


def test_majority_class():
    assert checks.get_majority_class(["a"] * 19 + ["b"]) == ("a", 19)
    assert checks.get_majority_class(["a"] * 18 + ["b", "c"]) is None
    assert checks.get_majority_class([]) is None


def test_stop_message_of_a_command_without_set():
    finding = Finding("missing_positives", "validation", 1, 2, (), "stop")
    message = explain_stop(finding, "train with")
    assert message.endswith("--corpus, or train with --set data.gate.missing_positives=warn.")
    assert explain_stop(finding).endswith("or pass --set data.gate.missing_positives=warn.")
