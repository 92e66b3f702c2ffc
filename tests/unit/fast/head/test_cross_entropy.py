"""Tests that chunked cross-entropy matches the full head's loss and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

import tiny_models
from ftlevel.fast import cross_entropy as head_module
from ftlevel.fast.cross_entropy import ChunkedCrossEntropy, losses_and_gradient

SMALL = {"vocab_size": 704, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
POSITIONS = torch.tensor([0, 3, 4, 9, 9, 17])  # in the flattened batch; one may predict twice
TARGETS = torch.tensor([1, 500, 3, 44, 45, 700])


def build_model(family: str) -> Any:
    """Return a tiny model with a language head."""
    torch.manual_seed(0)
    if family in tiny_models.FAMILIES:
        return tiny_models.build(family)
    import transformers

    fields = {
        "gemma2": {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 16},
        "cohere": {"logit_scale": 3.0},
        "granite": {"logits_scaling": 5.0},
    }[family]
    config = transformers.AutoConfig.for_model(family, **SMALL, **fields)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def compute_losses(model, positions=POSITIONS, targets=TARGETS, smoothing=0.0):
    """Return (loss, gradients) of the full head, and of chunked cross-entropy."""
    ids = torch.randint(10, 490, (2, 10), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    logits = model(**inputs).logits.float().flatten(0, 1)[positions]
    expected = functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    expected_gradients = torch.autograd.grad(expected / 7, parameters, allow_unused=True)
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    head = ChunkedCrossEntropy(base)
    actual = head.loss_sum(lambda: model(**inputs), positions, targets, smoothing=smoothing)
    actual_gradients = torch.autograd.grad(actual / 7, parameters, allow_unused=True)
    head.remove()
    after = model(**inputs).logits.float().flatten(0, 1)[positions]
    assert torch.equal(after, logits), "left as it was"
    return (expected, expected_gradients), (actual, actual_gradients)


def check_losses(model, **options):
    """Check that chunked cross-entropy has the full head's loss and gradients."""
    (expected, expected_gradients), (actual, actual_gradients) = compute_losses(model, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    for a, b in zip(actual_gradients, expected_gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7


@pytest.fixture
def two_chunks(monkeypatch):
    monkeypatch.setattr(head_module, "MIN_TARGETS", 4)
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", 1)


@pytest.mark.usefixtures("two_chunks")
@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma3_text", "opt", "bert", "albert", "electra", "modernbert",
               "distilbert", "roberta", "t5", "mt5", "bart", "gemma2", "cohere", "granite"]
)  # fmt: skip
def test_loss_and_gradients_match_full_head(family):
    model = build_model(family)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    check_losses(model)


@pytest.mark.usefixtures("two_chunks")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_label_smoothing_matches_full_head(family):
    check_losses(build_model(family), smoothing=0.2)


def test_head_with_adapter_and_trained_head():
    for config in (
        LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ):
        check_losses(get_peft_model(build_model("llama"), config))


def test_no_targets_give_zero_loss():
    empty = torch.zeros(0, dtype=torch.long)
    _, (actual, actual_gradients) = compute_losses(build_model("llama"), empty, empty)
    assert actual == 0
    assert all(part.abs().max() == 0 for part in actual_gradients if part is not None)


@pytest.mark.usefixtures("two_chunks")
def test_callback_receives_logits_per_chunk():
    model, chunks = build_model("llama"), []
    ids = torch.randint(10, 490, (2, 10))
    head = ChunkedCrossEntropy(model)
    with torch.no_grad():
        total = head.loss_sum(
            lambda: model(input_ids=ids), POSITIONS, TARGETS, lambda z, y: chunks.append((z, y))
        )
        head.remove()
        logits = model(input_ids=ids).logits.flatten(0, 1)[POSITIONS]
    assert [len(targets) for _, targets in chunks] == [4, 2]
    torch.testing.assert_close(torch.cat([logits for logits, _ in chunks]), logits)
    torch.testing.assert_close(total, functional.cross_entropy(logits, TARGETS, reduction="sum"))


def test_head_computes_only_supervised_positions():
    model, widths = build_model("llama"), []
    model.lm_head.register_forward_hook(lambda m, a, out: widths.append(out.shape[:-1].numel()))
    head = ChunkedCrossEntropy(model)
    head.loss_sum(lambda: model(input_ids=torch.randint(10, 490, (2, 10))), POSITIONS, TARGETS)
    assert widths == [len(POSITIONS), 0]


@pytest.mark.parametrize("kind", ["loss", "likelihoods"])
def test_float16_keeps_gradients_of_small_probabilities(kind):
    """The gradient scaler multiplies a loss of one target by 65,536, more than float16 has."""
    torch.manual_seed(0)
    weight, states = torch.randn(4000, 16) * 0.1, torch.zeros(1, 16)
    weight[1:] += 2
    bias = torch.full((4000,), -18.0)  # probabilities of 1.5e-8
    bias[0] = 0
    target = torch.tensor([0])

    def compute(dtype: torch.dtype) -> torch.Tensor:
        leaf = states.to(dtype).requires_grad_()

        def scores_of(x: torch.Tensor) -> torch.Tensor:
            return functional.linear(x, weight.to(dtype), bias.to(dtype))

        if kind == "likelihoods":
            loss = -head_module._Likelihoods.apply(leaf, target, scores_of, 1).sum()
        else:
            loss = head_module._SummedLoss.apply(
                leaf, lambda scores, at: _sum(losses_and_gradient(scores, target[at])), scores_of, 1
            )
        (gradient,) = torch.autograd.grad(loss * 65536, leaf)
        return gradient.float()

    exact, half = compute(torch.float32), compute(torch.float16)
    assert half.norm() > 0
    assert (half - exact).norm() < 0.02 * exact.norm()


def _sum(result: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return result[0].sum(), result[1]
