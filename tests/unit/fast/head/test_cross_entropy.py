"""Chunked cross-entropy is that of the whole head, gradients too, whatever follows the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

import tiny_models
from ftlevel.fast import cross_entropy as head_module
from ftlevel.fast.cross_entropy import ChunkedCrossEntropy

SMALL = {"vocab_size": 704, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
AT = torch.tensor([0, 3, 4, 9, 9, 17])  # of the flattened batch; a place may predict twice
TARGETS = torch.tensor([1, 500, 3, 44, 45, 700])


def make(family: str) -> Any:
    """Return a tiny model with a language head."""
    torch.manual_seed(0)
    if family in tiny_models.FAMILIES:
        return tiny_models.build(family)
    import transformers

    more = {
        "gemma2": {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 16},
        "cohere": {"logit_scale": 3.0},
        "granite": {"logits_scaling": 5.0},
    }[family]
    config = transformers.AutoConfig.for_model(family, **SMALL, **more)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def losses(
    model: Any, at: torch.Tensor = AT, targets: torch.Tensor = TARGETS, smoothing: float = 0.0
) -> tuple[Any, Any]:
    """Return (loss, gradients) of the whole head and of supervised tokens."""
    ids = torch.randint(10, 490, (2, 10), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    whole = model(**inputs).logits.float().flatten(0, 1)[at]
    expected = functional.cross_entropy(whole, targets, reduction="sum", label_smoothing=smoothing)
    wanted = torch.autograd.grad(expected / 7, parameters, allow_unused=True)
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    head = ChunkedCrossEntropy(base)
    found = head.loss_sum(lambda: model(**inputs), at, targets, smoothing=smoothing)
    got = torch.autograd.grad(found / 7, parameters, allow_unused=True)
    head.remove()
    assert torch.equal(model(**inputs).logits.float().flatten(0, 1)[at], whole), "left as it was"
    return (expected, wanted), (found, got)


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma3_text", "opt", "bert", "albert", "electra", "modernbert",
               "distilbert", "roberta", "t5", "mt5", "bart", "gemma2", "cohere", "granite"]
)  # fmt: skip
def test_loss_and_every_gradient(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "MIN_TARGETS", 4)  # two chunks
    monkeypatch.setattr(head_module, "CHUNK_SCORES", 1)
    model = make(family)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    (expected, wanted), (found, got) = losses(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for one, other in zip(got, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).norm() <= 1e-5 * other.norm() + 1e-7


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_smoothed_labels(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "MIN_TARGETS", 4)  # two chunks
    monkeypatch.setattr(head_module, "CHUNK_SCORES", 1)
    (expected, wanted), (found, got) = losses(make(family), smoothing=0.2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-7


def test_a_head_with_an_adapter_and_a_head_that_is_trained() -> None:
    for config in (
        LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ):
        model = get_peft_model(make("llama"), config)
        (expected, wanted), (found, got) = losses(model)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        for one, other in zip(got, wanted, strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm() + 1e-7


def test_no_target_is_no_loss() -> None:
    none = torch.zeros(0, dtype=torch.long)
    _, (found, got) = losses(make("llama"), none, none)
    assert found == 0
    assert all(part.abs().max() == 0 for part in got if part is not None)


def test_scores_are_shown_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "MIN_TARGETS", 4)
    monkeypatch.setattr(head_module, "CHUNK_SCORES", 1)
    model, seen = make("llama"), []
    ids = torch.randint(10, 490, (2, 10))
    head = ChunkedCrossEntropy(model)
    with torch.no_grad():
        total = head.loss_sum(
            lambda: model(input_ids=ids), AT, TARGETS, lambda z, y: seen.append((z, y))
        )
        head.remove()
        whole = model(input_ids=ids).logits.flatten(0, 1)[AT]
    assert [len(targets) for _, targets in seen] == [4, 2]
    torch.testing.assert_close(torch.cat([scores for scores, _ in seen]), whole)
    torch.testing.assert_close(total, functional.cross_entropy(whole, TARGETS, reduction="sum"))


def test_only_the_chunk_is_scored() -> None:
    model, widths = make("llama"), []
    model.lm_head.register_forward_hook(lambda m, a, out: widths.append(out.shape[:-1].numel()))
    head = ChunkedCrossEntropy(model)
    head.loss_sum(lambda: model(input_ids=torch.randint(10, 490, (2, 10))), AT, TARGETS)
    assert widths == [len(AT), 1]
