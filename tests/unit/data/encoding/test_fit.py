"""Rows beyond the maximum length: each overlong policy, without silently truncated answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlevel.data.encoding.fit import (
    FittedRows,
    LengthBounds,
    check_not_empty,
    fit_rows,
    fit_targets,
)
from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.data.gate.checks import FlatRows, has_missing_eos
from ftlevel.errors import InputError

EOS = 2


def pair(prompt: int, answer: int, row: int = 0) -> Encoded:
    """Return a row of distinct tokens of which `answer` are supervised."""
    ids = [*range(10, 10 + prompt + answer - 1), EOS]
    return Encoded(ids, [IGNORED] * prompt + ids[prompt:], row)


def text(length: int, row: int = 0) -> Encoded:
    return pair(0, length, row)


def fit(
    rows: list[Encoded], length: int | str, overlong: str = "error", **bounds: Any
) -> FittedRows:
    return fit_rows(rows, length, LengthBounds(**bounds), overlong, lambda i: f"x.jsonl:{i + 1}")


def answer(row: Encoded) -> list[int]:
    assert isinstance(row.labels, list)
    return [label for label in row.labels if label != IGNORED]


def lengths(fitted: FittedRows) -> list[int]:
    return [len(row.input_ids) for row in fitted.rows]


def test_auto_length_keeps_all_rows_within_bounds():
    rows = [pair(3, 4, 0), pair(30, 20, 1)]
    for bounds in ({}, {"positions": 50}, {"positions": 50, "memory": 50}, {"memory": 64}):
        fitted = fit(rows, "auto", **bounds)
        assert (fitted.max_length, fitted.dropped) == (50, 0)
        assert (fitted.reason, fitted.overlong) == ("auto: the longest row", "error")


@pytest.mark.parametrize(
    ("bounds", "name"),
    [
        ({"positions": 40}, "the model's positions"),
        ({"positions": 60, "memory": 40}, "this machine's memory"),
        ({"memory": 40}, "this machine's memory"),
    ],
)
def test_auto_length_drops_and_reports_up_to_one_percent(bounds, name):
    rows = [pair(3, 4, i) for i in range(99)] + [pair(30, 20, 99)]
    fitted = fit(rows, "auto", **bounds)
    assert (fitted.max_length, fitted.dropped, len(fitted.rows)) == (40, 1, 99)
    assert fitted.reason == f"auto: {name}; 1 row is longer, up to 50, and dropped"
    assert fitted.overlong == "drop", "what config.yaml must say, so that it gives the same rows"
    larger = [pair(3, 4, i) for i in range(197)] + [pair(30, 20, i) for i in (197, 198)] * 2
    with pytest.raises(InputError, match="4 of 201 rows are longer than 40 tokens"):
        fit(larger, "auto", **bounds)
    assert len(fit([pair(3, 4, 0)] * 400 + larger[-4:], "auto", **bounds).rows) == 400


def test_explicit_length_raises_for_longer_rows():
    rows = [pair(3, 4, i) for i in range(199)] + [pair(30, 20, 199)]
    with pytest.raises(InputError) as error:
        fit(rows, 40, positions=64)
    assert str(error.value) == (
        "1 of 200 rows are longer than 40 tokens; the longest has 50 (x.jsonl:200). Raise "
        "--max-length to 50 to keep all of them, or pass --overlong drop or truncate-prompt."
    )
    with pytest.raises(InputError) as error:
        fit([text(50)], "auto", positions=40)
    assert str(error.value) == (
        "1 of 1 rows are longer than 40 tokens (the model's positions); the longest has 50 "
        "(x.jsonl:1). Pass --overlong drop or split."
    )
    with pytest.raises(InputError) as error:
        fit([pair(30, 20)], "auto", positions=64, memory=40)
    assert str(error.value) == (
        "1 of 1 rows are longer than 40 tokens (this machine's memory); the longest has 50 "
        "(x.jsonl:1). Use --gradient-checkpointing or a smaller model, or pass --overlong drop or "
        "truncate-prompt."
    )
    with pytest.raises(InputError, match="--max-length 65 is beyond the model's 64 positions"):
        fit(rows, 65, positions=64)


def test_drop_removes_only_overlong_rows():
    rows = [pair(3, 4, 0), pair(30, 3, 1), pair(4, 6, 2)]
    fitted = fit(rows, 10, "drop")
    assert [row.row for row in fitted.rows] == [0, 2]
    assert (fitted.dropped, fitted.long_prompts) == (1, (1,))
    none = fit(rows, 5, "drop")
    with pytest.raises(InputError) as error:
        check_not_empty(none, rows)
    assert str(error.value) == (
        "no row is left within --max-length 5: the shortest has 7 tokens. Raise --max-length."
    )


def test_truncate_prompt_keeps_answers_whole():
    rows = [pair(3, 4, 0), pair(12, 4, 1), pair(12, 9, 2), pair(1, 12, 3)]
    fitted = fit(rows, 10, "truncate-prompt")
    assert [row.row for row in fitted.rows] == [0, 1, 2]
    assert (fitted.shortened, fitted.dropped, fitted.lost) == (2, 1, (3,))
    assert fitted.shortened_at == "the beginning of the prompt"
    for row in fitted.rows:
        assert answer(row) == answer(rows[row.row])
        assert row.input_ids[0] == 10, "BOS, where there is one, stays"
        assert row.input_ids[1:] == rows[row.row].input_ids[-len(row.input_ids) + 1 :]


def test_truncation_before_turn_leaves_one_bos():
    """SmolLM2's BOS token begins every turn: <|im_start|>system … <|im_start|>user …"""
    ids = [1, 20, 21, 1, 30, 31, 40, 41]
    row = Encoded(ids, [IGNORED] * 6 + [40, 41], 0)
    for limit, expected in ((7, [1, 21, 1, 30, 31, 40, 41]), (6, [1, 30, 31, 40, 41]),
                        (5, [1, 30, 31, 40, 41]), (3, [1, 40, 41])):  # fmt: skip
        (truncated,) = fit([row], limit, "truncate-prompt").rows
        assert truncated.input_ids == expected


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=20))
def test_answers_are_whole_or_counted_as_dropped(sizes):
    rows = [pair(prompt, answer, i) for i, (prompt, answer) in enumerate(sizes)]
    rows.append(pair(1, 2, len(rows)))
    for policy in ("drop", "truncate-prompt"):
        fitted = fit(rows, 16, policy)
        assert max(lengths(fitted)) <= 16
        assert len(fitted.rows) + fitted.dropped == len(rows)
        assert all(answer(row) == answer(rows[row.row]) for row in fitted.rows)


@given(st.lists(st.integers(2, 60), min_size=1, max_size=20), st.integers(2, 16))
def test_split_supervises_every_token_once(sizes, limit):
    rows = [text(size, i) for i, size in enumerate(sizes)]
    fitted = fit(rows, limit, "split")
    for row in rows:
        pieces = [piece for piece in fitted.rows if piece.row == row.row]
        assert [token for piece in pieces for token in answer(piece)] == row.input_ids
        assert all(answer(replace(piece, labels=piece.labels[1:])) for piece in pieces)  # shifted
        assert all(label in (IGNORED, token) for piece in pieces
                   for token, label in zip(piece.input_ids, piece.labels, strict=True))  # fmt: skip
    assert max(lengths(fitted)) <= limit
    assert fitted.split == sum(size > limit for size in sizes)


def test_split_supervises_final_eos():
    fitted = fit([text(9)], 4, "split")
    assert [row.input_ids for row in fitted.rows] == [
        [10, 11, 12, 13], [14, 15, 16, 17], [17, EOS]]  # fmt: skip
    assert fitted.rows[-1].labels == [IGNORED, EOS]
    assert not has_missing_eos(FlatRows.of(fitted.rows), {EOS}).any()


def test_pairs_are_not_split():
    fitted = fit([pair(3, 4, 0), pair(12, 4, 1)], 10, "split")
    assert ([row.row for row in fitted.rows], fitted.lost) == ([0], (1,))


def test_classified_text_keeps_special_tokens_at_both_ends():
    row = Encoded(list(range(20)), 1, 0, {"token_type_ids": [0] * 20})
    fitted = fit([row], 8, "truncate-prompt")
    assert fitted.rows[0].input_ids == [0, 1, 2, 3, 4, 5, 6, 19]
    assert fitted.rows[0].extras == {"token_type_ids": [0] * 8}
    assert fitted.shortened_at == "the end of the text"


def test_overlong_targets_raise_or_are_dropped():
    rows = [Encoded([5, 6], list(range(n)), i) for i, n in enumerate((4, 9))]
    with pytest.raises(InputError) as error:
        fit_targets(rows, 8, "truncate-prompt", lambda i: f"x.jsonl:{i + 1}")
    assert str(error.value) == (
        "1 of 2 targets are longer than 8 tokens; the longest has 9 (x.jsonl:2). Raise it by --set "
        "data.max_target_length=9, or pass --overlong drop."
    )
    remaining, dropped = fit_targets(rows, 8, "drop", lambda i: f"x.jsonl:{i + 1}")
    assert ([row.row for row in remaining], dropped) == ([0], 1)
