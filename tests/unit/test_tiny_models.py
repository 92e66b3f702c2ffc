"""The tiny models of the tests: every family and head builds and runs, the same each time."""

from __future__ import annotations

import pytest
import torch

from tiny_models import FAMILIES, FAMILY_HEADS, LABELS, VOCAB, build, build_batch, compute_logits


@pytest.mark.parametrize(("family", "head"), FAMILY_HEADS)
def test_every_head_returns_finite_loss_and_logits(family, head):
    model, inputs = build(family, head), build_batch(family, head)
    loss = model(**inputs).loss
    logits = compute_logits(model, inputs)
    width = {"seqcls": LABELS, "tokcls": LABELS, "qa": 24}.get(head, VOCAB)
    assert torch.isfinite(loss)
    assert torch.isfinite(logits).all()
    assert logits.shape[0] == 2
    assert logits.shape[-1] == width


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_depend_only_on_seed(family):
    before = torch.random.get_rng_state()
    first, second, third = build(family), build(family), build(family, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    pairs = zip(first.parameters(), third.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)
