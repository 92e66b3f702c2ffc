"""Comparing two models by what they say of the same rows."""

from __future__ import annotations

import contextlib
from dataclasses import asdict

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ftlevel.artifacts.cards import format_difference
from ftlevel.data.encoding.encode import Encoded
from ftlevel.evaluation.two_models import (
    MAX_TARGETS,
    EvalSet,
    RowLogits,
    compare_logits,
    in_float32,
)
from ftlevel.tasks.classes import Classes, MultiLabel
from ftlevel.tasks.losses import Tokens
from ftlevel.tasks.span import Spans
from ftlevel.tasks.tags import Tags
from tiny_models import build, build_batch, compute_logits


def test_the_figures_are_those_of_their_definitions() -> None:
    first, second = torch.tensor([[1.0, 2.0, 0.0], [4.0, 0.0, 1.0]]), torch.zeros(2, 3)
    second[0, 1] = 2.0
    found = compare_logits(RowLogits([first], 1.5, 2), RowLogits([second], 1.25, 2))
    p, q = first.softmax(-1), second.softmax(-1)
    assert found.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    assert found.top1 == 1.0  # of equal numbers the first is the largest
    assert found.max_difference == 4.0
    assert found.mean_difference == pytest.approx(1.0)
    assert (found.scale, found.loss, found.loss_reference, found.targets) == (4.0, 1.25, 1.5, 2)


def test_scores_that_choose_nothing_are_told_apart_by_their_difference() -> None:
    first, second = torch.tensor([[0.5], [1.0]]), torch.tensor([[0.0], [2.0]])
    found = compare_logits(
        RowLogits([first], 1.0, 2, has_choice=False), RowLogits([second], 1.0, 2)
    )
    assert (found.kl, found.top1, found.distance) == (None, None, 0.75)
    assert format_difference(asdict(found)) == "0.75 on average"


def test_targets_are_the_supervised_ones() -> None:
    logits, mask = torch.rand(2, 4, 5), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    labels = torch.tensor([[-100, 3, -100, -100], [-100, 1, 2, -100]])
    shifted = Tokens("x", shifted=True).choices(logits, labels, mask)
    assert torch.equal(shifted, torch.stack([logits[0, 0], logits[1, 0], logits[1, 1]]))
    assert Tags("x").choices(logits, labels, mask).shape == (3, 5)
    assert Classes("x").choices(logits[:, 0], labels[:, 0], mask).shape == (2, 5)
    yes_or_no = MultiLabel("x").choices(logits[:, 0], labels[:, 0], mask)
    assert torch.allclose(yes_or_no.softmax(-1)[:, 1], logits[:, 0].flatten().sigmoid())
    spans = Spans("x").choices(logits[..., :2], labels[:, :2], mask)
    assert spans.shape == (4, 4)
    assert spans[0, 3] == spans[1, 3] == -1e4, "padding is no candidate"


def test_no_more_targets_are_kept_than_fit() -> None:
    rows = [Encoded(list(range(10, 110)), list(range(10, 110)), i) for i in range(8)]
    probe = EvalSet(rows, Tokens("x", shifted=True), 0, "cpu")
    scores = probe.score(build("llama"), "float32")
    assert scores.targets == sum(map(len, scores.logits)) == MAX_TARGETS


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_float32_on_narrow_weights_is_the_widened_model(family: str) -> None:
    narrow, batch = build(family).to(torch.bfloat16), build_batch(family)
    with in_float32(narrow):
        found = compute_logits(narrow, batch)
    assert found.dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in narrow.parameters())
    low = compute_logits(narrow, batch).float()
    wide = compute_logits(narrow.float(), batch)
    share = 0.25 if family == "t5" else 0.1  # T5 itself narrows the input of its wo
    assert (found - wide).abs().max() < share * (low - wide).abs().max()


@pytest.mark.parametrize("disabled", [False, True])
def test_trained_tokens_of_a_tied_model_are_computed_in_float32(disabled: bool) -> None:
    """PEFT's layer of them reads the weight of the layer around which it is, uncalled."""
    base = build("llama", tie_word_embeddings=True).to(torch.bfloat16)
    settings = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 9])
    model, batch = get_peft_model(base, settings).eval(), build_batch("llama")
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += torch.randn_like(parameter)
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    with model.disable_adapter() if disabled else contextlib.nullcontext():
        with in_float32(model):
            found = compute_logits(model, batch)
        assert {name: parameter.dtype for name, parameter in model.named_parameters()} == before
        wide = compute_logits(model.float(), batch)
    torch.testing.assert_close(found, wide, rtol=0, atol=1e-5)
