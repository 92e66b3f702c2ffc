"""Tests that every token of every row is in exactly one batch of an epoch, for every collator."""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

import tiny_models
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.data.prepare.samplers import LengthGroupedSampler
from ftlevel.fast.plan import FastPlan
from ftlevel.fast.step_collator import StepCollator
from ftlevel.tasks.losses import Tokens
from ftlevel.training.trainer import FtlevelTrainer

PAD = 0
COLLATORS = {
    "plain": Collator(PAD),
    "padded": StepCollator(PAD, FastPlan(True, tokens=64)),
    "packed": StepCollator(PAD, FastPlan(True, packs=True, tokens=64)),
    "shared": StepCollator(PAD, FastPlan(True, packs=True, prefix_tree=True, tokens=64)),
}
model = functools.cache(lambda: tiny_models.build("llama"))
output_dir = functools.cache(tempfile.mkdtemp)


def get_batches(rows: list[Encoded], collate: Any, size: int, *, by_length: bool) -> list[Any]:
    """Return the batches, or micro-batches, of one epoch of the Trainer's data loader."""
    arguments = TrainingArguments(
        output_dir(), use_cpu=True, report_to="none", per_device_train_batch_size=size,
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    order = LengthGroupedSampler([len(r.input_ids) for r in rows], size, 1) if by_length else None
    trainer = FtlevelTrainer(
        objective=Tokens("perplexity"), model=model(), args=arguments, train_dataset=rows,
        data_collator=collate, order=order,
    )  # fmt: skip
    batches = trainer.get_train_dataloader()
    return [part for batch in batches for part in batch.get("micro_batches", [batch])]


def get_token_label_pairs(micro_batch: dict[str, Any]) -> list[tuple[int, int]]:
    """Return each token with its label, as passed to the model and the loss."""
    ids, labels = micro_batch["input_ids"], micro_batch["labels"]
    mask = micro_batch["attention_mask"].bool()
    if layout := micro_batch.get("layout"):
        ids = layout.unpack(layout.pack(ids[..., None]))[..., 0]
    assert (labels[~mask] == IGNORED).all()
    return list(zip(ids[mask].tolist(), labels[mask].tolist(), strict=True))


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("name", COLLATORS)
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), min_size=1, max_size=30),
    size=st.integers(1, 7),
)
def test_epoch_contains_every_token_once(name, by_length, lengths, size):
    rows = []
    for index, (start, length) in enumerate(lengths):
        # Rows with the same `start` share a prefix, followed by tokens unique to the row.
        ids = [start] * (20 if length % 2 else 1)
        unique = [1_000 * (index + 1) + i for i in range(length)]
        rows.append(Encoded(ids + unique, [IGNORED] * len(ids) + unique, index))
    micro_batches = get_batches(rows, COLLATORS[name], size, by_length=by_length)
    expected = Counter(p for row in rows for p in zip(row.input_ids, row.labels, strict=True))
    assert Counter(p for part in micro_batches for p in get_token_label_pairs(part)) == expected
    assert sum(int(part["attention_mask"].sum()) for part in micro_batches) == expected.total()
    if name == "shared":
        layouts = [micro_batch["layout"] for micro_batch in micro_batches]
        assert all(torch.unique(layout.source).numel() == layout.tokens for layout in layouts)
