from __future__ import annotations

from typing import Any

import pytest

from ftlevel.data.encoding.collate import MaskedRows, encode_masked
from ftlevel.data.encoding.row import IGNORED
from ftlevel.data.formats.examples import PlainText
from ftlevel.errors import InputError
from tiny_tokenizers import build_tokenizer

TEXT = "the argument parser reads a module and returns the value of a string object " * 12


def mask_rows(share: float = 0.15, seed: int = 1, texts: int = 40) -> tuple[MaskedRows, Any]:
    tokenizer = build_tokenizer("bert", None)
    rows = encode_masked(tokenizer, [PlainText(TEXT, i) for i in range(texts)], None)
    return MaskedRows(rows, tokenizer, ratio=share, seed=seed), tokenizer


def test_long_texts_are_split_into_blocks():
    tokenizer = build_tokenizer("bert", None)
    rows = encode_masked(tokenizer, [PlainText(TEXT, 0), PlainText("the value", 1)], 32)
    assert all(len(row.input_ids) <= 32 for row in rows)
    assert all(row.input_ids[0] == tokenizer.cls_token_id for row in rows)
    assert all(row.input_ids[-1] == tokenizer.sep_token_id for row in rows)
    inner = [token for row in rows if row.row == 0 for token in row.input_ids[1:-1]]
    assert inner == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert [row.row for row in rows][-1] == 1


def test_masking_depends_only_on_seed_epoch_and_row():
    first, _ = mask_rows()
    second, _ = mask_rows()
    assert [second[i] for i in (3, 0, 3)] == [first[3], first[0], first[3]]
    assert first[0].labels != first[1].labels
    second.epoch = 1
    assert second[0] != first[0]
    second.epoch = 0
    assert second[0] == first[0]
    assert mask_rows(seed=2)[0][0] != first[0]
    assert first.fixed() == second.fixed()
    assert first.fixed()[0] != first[0]
    assert first[-1] == first[len(first) - 1]
    assert list(first)[:2] == first[:2]


def test_masking_ratios_match_bert():
    rows, tokenizer = mask_rows(texts=200)
    counts = {"mask": 0, "same": 0, "random": 0}
    total = 0
    for original, row in zip(rows.rows, rows, strict=True):
        special = {tokenizer.cls_token_id, tokenizer.sep_token_id}
        inner = len(row.input_ids) - 2
        masked_positions = [i for i, label in enumerate(row.labels) if label != IGNORED]
        assert len(masked_positions) == round(0.15 * inner)
        total += len(masked_positions)
        for i, (before, after) in enumerate(zip(original.input_ids, row.input_ids, strict=True)):
            if i not in masked_positions:
                assert after == before
                continue
            assert row.labels[i] == before
            assert before not in special
            kind = {tokenizer.mask_token_id: "mask", before: "same"}.get(after, "random")
            counts[kind] += 1
    assert counts["mask"] / total == pytest.approx(0.8, abs=0.02)
    assert counts["same"] / total == pytest.approx(0.1, abs=0.02)
    assert counts["random"] / total == pytest.approx(0.1, abs=0.02)


def test_short_text_has_one_masked_token():
    tokenizer = build_tokenizer("bert", None)
    rows = MaskedRows(
        encode_masked(tokenizer, [PlainText("a", 0)], None), tokenizer, ratio=0.15, seed=0
    )
    assert rows[0].supervised == 1


def test_tokenizer_without_mask_token_raises():
    with pytest.raises(InputError, match="no mask token"):
        encode_masked(build_tokenizer("gpt2", None), [PlainText("a", 0)], None)
