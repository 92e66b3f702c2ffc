"""Comparison of two models by their outputs on the same rows."""

from __future__ import annotations

import contextlib
from dataclasses import asdict

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ftlevel.artifacts.cards import format_difference
from ftlevel.data.encoding.row import Encoded
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


def test_comparison_values_match_definitions():
    first, second = torch.tensor([[1.0, 2.0, 0.0], [4.0, 0.0, 1.0]]), torch.zeros(2, 3)
    second[0, 1] = 2.0
    comparison = compare_logits(RowLogits([first], 1.5, 2), RowLogits([second], 1.25, 2))
    p, q = first.softmax(-1), second.softmax(-1)
    assert comparison.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    assert comparison.top1 == 1.0  # the first of equal values is the largest
    assert comparison.max_difference == 4.0
    assert comparison.mean_difference == pytest.approx(1.0)
    assert (comparison.scale, comparison.loss, comparison.loss_reference, comparison.targets) == (
        4.0,
        1.25,
        1.5,
        2,
    )


def test_scores_without_classes_are_compared_by_difference():
    first, second = torch.tensor([[0.5], [1.0]]), torch.tensor([[0.0], [2.0]])
    comparison = compare_logits(
        RowLogits([first], 1.0, 2, has_choice=False), RowLogits([second], 1.0, 2)
    )
    assert (comparison.kl, comparison.top1, comparison.distance) == (None, None, 0.75)
    assert format_difference(asdict(comparison)) == "0.75 on average"


def test_choices_are_supervised_positions():
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


def test_number_of_targets_is_limited():
    rows = [Encoded(list(range(10, 110)), list(range(10, 110)), i) for i in range(8)]
    probe = EvalSet(rows, Tokens("x", shifted=True), 0, "cpu")
    scores = probe.score(build("llama"), "float32")
    assert scores.targets == sum(map(len, scores.logits)) == MAX_TARGETS


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_in_float32_on_bfloat16_weights_matches_float32_model(family):
    model, batch = build(family).to(torch.bfloat16), build_batch(family)
    with in_float32(model):
        actual = compute_logits(model, batch)
    assert actual.dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    bfloat16_logits = compute_logits(model, batch).float()
    float32_logits = compute_logits(model.float(), batch)
    share = 0.25 if family == "t5" else 0.1  # T5 itself casts the input of its wo layer
    assert (actual - float32_logits).abs().max() < share * (
        bfloat16_logits - float32_logits
    ).abs().max()


@pytest.mark.parametrize("disabled", [False, True])
def test_trainable_tokens_of_tied_model_are_computed_in_float32(disabled):
    """PEFT's token layer uses the weight of the wrapped layer without calling that layer."""
    base = build("llama", tie_word_embeddings=True).to(torch.bfloat16)
    settings = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 9])
    model, batch = get_peft_model(base, settings).eval(), build_batch("llama")
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += torch.randn_like(parameter)
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    with model.disable_adapter() if disabled else contextlib.nullcontext():
        with in_float32(model):
            actual = compute_logits(model, batch)
        assert {name: parameter.dtype for name, parameter in model.named_parameters()} == before
        expected = compute_logits(model.float(), batch)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
