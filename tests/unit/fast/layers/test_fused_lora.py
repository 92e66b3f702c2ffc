"""Tests that fused LoRA layers behave like PEFT's layers."""

from __future__ import annotations

import copy
import filecmp

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny_models
from ftlevel.config import SPECS
from ftlevel.fast import fused_lora
from ftlevel.fast.fused_lora import FusedForward, FusedLinear, FusedLoraFunction
from ftlevel.methods import Base
from ftlevel.models.hardware import autocast
from ftlevel.models.module_tree import get_heads
from ftlevel.trained.adapt import apply_method
from ftlevel.training.plan.method import resolve_method_targets
from matrix_cells import cached_base

HEADS = {"llama": "causal", "gpt2": "causal", "bert": "seqcls", "t5": "seq2seq"}
KINDS = {"encoder": "bert", "encoder-decoder": "t5"}
LORA_VARIANTS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    {"bias": "all"},
    {"lora_dropout": 0.3},
]


def build(family: str, quant: str = "none", *, fused: bool, dtype: str = "float32", **fields):
    """Return a tiny model with a nonzero LoRA, in training mode."""
    torch.manual_seed(0)
    head = HEADS[family]
    model = copy.deepcopy(cached_base(family, head, quant))
    if dtype == "bfloat16" and quant == "none":
        model = model.to(torch.bfloat16)
    for module in model.modules():
        if dtype == "bfloat16" and quant == "4bit" and hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.bfloat16
    spec = SPECS["lora"](**{"r": 4, "lora_alpha": 8.0, **fields})
    targets = resolve_method_targets(spec, model, family, quant)
    kind = {"bert": "encoder", "t5": "encoder-decoder"}.get(family, "decoder")
    heads = get_heads(model) if head == "seqcls" else []
    task = {"causal": "CAUSAL_LM", "seqcls": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}[head]
    method_base = Base(model.config, kind, task, targets.modules, heads, targets.fan_in_fan_out, 10)
    model = apply_method(model, spec, method_base, fused=fused)
    randomize(model)
    return model.train()


def randomize(model) -> None:
    """Draw every B at random; most gradients are zero for B = 0."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def backward(model, family: str, dtype: str = "float32"):
    """Return the loss of a batch and the gradient of every trained tensor."""
    torch.manual_seed(3)
    model.zero_grad()
    with autocast("cpu", dtype):
        loss = model(**tiny_models.build_batch(family, HEADS[family])).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def fused_layers(model) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, FusedForward)]


def check_gradients(actual, expected):
    """Check that two results of `backward` are equal within rounding in float32."""
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    assert actual[1].keys() == expected[1].keys()
    for name, grad in actual[1].items():
        assert relative_error(grad, expected[1][name]) < 1e-5, name


def check_equal(model, change, dtype="float32"):
    """Check that loss and gradients stay exactly equal after `change`."""
    loss, grads = backward(model, "llama", dtype)
    grads = {name: grad.clone() for name, grad in grads.items()}
    change()
    after, grads_after = backward(model, "llama", dtype)
    assert loss == after
    assert all(torch.equal(grads[name], grads_after[name]) for name in grads)


@pytest.mark.parametrize("quant", ["none", "4bit", "8bit"])
@pytest.mark.parametrize("family", HEADS)
def test_loss_and_gradients_match_peft_in_float32(family, quant, monkeypatch):
    calls, original = [], FusedLoraFunction.forward
    counted = staticmethod(lambda ctx, *a: (calls.append(1), original(ctx, *a))[1])
    monkeypatch.setattr(FusedLoraFunction, "forward", counted)
    model = build(family, quant, fused=True)
    check_gradients(backward(model, family), backward(build(family, quant, fused=False), family))
    lora_layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(calls) == len(lora_layers) == len(fused_layers(model)) > 0


@pytest.mark.parametrize("quant", ["none", "4bit", "8bit"])
@pytest.mark.parametrize("family", HEADS)
def test_bfloat16_error_is_close_to_peft(family, quant):
    _, exact = backward(build(family, quant, fused=False), family)
    errors = []
    for fused in (True, False):
        _, grads = backward(build(family, quant, fused=fused, dtype="bfloat16"), family, "bfloat16")
        errors.append(sum(relative_error(grads[name], exact[name]) for name in exact) / len(exact))
    assert errors[0] < 1.1 * errors[1] < 0.1


@pytest.mark.parametrize("fields", LORA_VARIANTS, ids=str)
def test_lora_variants_match_peft(fields):
    models = [build("llama", fused=fused, **fields) for fused in (True, False)]
    check_gradients(*(backward(model, "llama") for model in models))


def test_fused_function_gradcheck():
    torch.manual_seed(0)
    x, dropped, a, b, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 5), (2, 3, 5), (2, 5), (4, 2), (4,))
    )
    weight = torch.randn(4, 5, dtype=torch.float64)
    for lora_input in (None, dropped):
        for bias_input in (None, bias):
            inputs = (x, lora_input, a, b, bias_input, lambda: weight, 1.7)
            y = FusedLoraFunction.apply(*inputs)
            used_input = x if lora_input is None else lora_input
            expected = nn.functional.linear(x, weight, bias_input) + 1.7 * used_input @ a.T @ b.T
            torch.testing.assert_close(y, expected)
            assert torch.autograd.gradcheck(FusedLoraFunction.apply, inputs)


def test_bfloat16_dropout_depends_on_seed():
    model = build("llama", fused=True, dtype="bfloat16", lora_dropout=0.5)
    check_equal(model, lambda: None, "bfloat16")
    layer = fused_layers(model)[0]
    x = torch.ones(4000, layer.in_features, dtype=torch.bfloat16)
    mean = (layer(x) - layer.base_layer(x)).float().mean(0)
    layer.lora_dropout["default"] = nn.Identity()
    expected = (layer(x[:1]) - layer.base_layer(x[:1])).float()[0]
    assert relative_error(mean, expected) < 0.05


def test_checkpointing_is_bit_identical():
    model = build("llama", fused=True, lora_dropout=0.3)
    model.config.use_cache = False
    check_equal(model, lambda: model.gradient_checkpointing_enable({"use_reentrant": False}))


def add_other_adapter(models):
    for model in models:
        torch.manual_seed(5)
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
        randomize(model)
    batch = tiny_models.build_batch("llama")
    del batch["labels"]
    return batch


@pytest.mark.parametrize("quant", ["none", "4bit", "8bit"])
def test_switching_and_disabling_adapters_matches_peft(quant):
    models = [build("llama", quant, fused=fused) for fused in (True, False)]
    batch = add_other_adapter(models)
    for active in ("default", "other", ["default", "other"]):
        for model in models:
            model.base_model.set_adapter(active)
        actual, expected = (model(**batch).logits for model in models)
        assert relative_error(actual, expected) < 1e-5
    with models[0].disable_adapter(), models[1].disable_adapter():
        assert torch.equal(*(model(**batch).logits for model in models))
    assert torch.equal(*(model.eval()(**batch).logits for model in models))


@pytest.mark.parametrize("quant", ["none", "4bit", "8bit"])
@pytest.mark.parametrize("fields", [{}, {"lora_dropout": 0.3}], ids=str)
def test_layouts_of_narrow_tensors_give_the_same_gradients(quant, fields, monkeypatch):
    """A GPU stores tensors of width r as (tokens, r), a CPU as (r, tokens)."""
    results, strides, original = [], [], fused_lora._narrow
    recorded = lambda *a: (strides.append(original(*a).stride(0)), original(*a))[1]  # noqa: E731
    monkeypatch.setattr(fused_lora, "_narrow", recorded)
    for on_gpu in (False, True):
        monkeypatch.setattr(fused_lora, "is_on_gpu", lambda _, on_gpu=on_gpu: on_gpu)
        results.append(backward(build("llama", quant, fused=True, **fields), "llama"))
    half = len(strides) // 2
    assert 1 not in strides[:half]
    assert set(strides[half:]) == {1}
    check_gradients(*reversed(results))


@pytest.mark.parametrize("quant", ["none", "4bit", "8bit"])
def test_evaluation_on_gpu_is_fused_for_one_active_adapter(quant, monkeypatch):
    """Several, merged, disabled and mixed adapters use PEFT's forward; 8-bit layers always do."""
    models = [build("llama", quant, fused=fused).eval() for fused in (True, False)]
    calls, original = [], fused_lora.compute_without_gradient
    counted = lambda *a: (calls.append(1), original(*a))[1]  # noqa: E731
    monkeypatch.setattr(fused_lora, "is_on_gpu", lambda _: True)
    monkeypatch.setattr(fused_lora, "compute_without_gradient", counted)
    batch = add_other_adapter(models)
    count = 0 if quant == "8bit" else len(fused_layers(models[0]))

    def compare(num_calls, **arguments):
        calls.clear()
        with torch.no_grad():
            actual, expected = (model(**batch, **arguments).logits for model in models)
        assert relative_error(actual, expected) < 1e-5
        assert len(calls) == num_calls
        return actual

    logits = []
    for active in ("default", "other", ["default", "other"]):
        for model in models:
            model.base_model.set_adapter(active)
        logits.append(compare(0 if isinstance(active, list) else count))
    assert not torch.allclose(logits[0], logits[1])
    names = ["default", "other", "__base__"] * len(batch["input_ids"])
    compare(0, adapter_names=names[: len(batch["input_ids"])])
    with models[0].disable_adapter(), models[1].disable_adapter():
        compare(0)
    for model in models:
        model.base_model.set_adapter("other")
    compare(count)
    for model in models:
        model.merge_adapter()
    compare(0)
    for model in models:
        model.unmerge_adapter()
    compare(count)
    hook = fused_layers(models[0])[0].base_layer.register_forward_hook(lambda *_: None)
    compare(max(count - 1, 0))
    hook.remove()
    compare(count)


def test_evaluation_on_gpu_of_dora_uses_peft_layer(monkeypatch):
    monkeypatch.setattr(fused_lora, "is_on_gpu", lambda _: True)
    batch = tiny_models.build_batch("llama")
    logits = [build("llama", fused=f, use_dora=True).eval()(**batch).logits for f in (True, False)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("quant", ["none", "4bit", "8bit"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_weights_are_bit_identical_to_peft(family, quant):
    merged = []
    for fused in (True, False):
        model = build(family, quant, fused=fused)
        backward(model, family)  # bitsandbytes moves its 8-bit state
        model.merge_adapter()
        if quant == "none":  # unmerging a quantized weight is not exact
            model.unmerge_adapter()
        merged.append(model.merge_and_unload().state_dict())
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


def test_saved_adapter_is_plain_lora(tmp_path):
    for fused in (True, False):
        build("llama", fused=fused).save_pretrained(tmp_path / str(fused))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert filecmp.cmp(tmp_path / "True" / name, tmp_path / "False" / name, shallow=False)
    loaded = peft.PeftModel.from_pretrained(
        copy.deepcopy(cached_base("llama", "causal", "none")), tmp_path / "True"
    )
    assert not fused_layers(loaded)
    batch = tiny_models.build_batch("llama")
    expected = build("llama", fused=True).eval()(**batch).logits
    assert torch.equal(loaded(**batch).logits, expected)


class CustomLinear(nn.Linear):
    """A linear layer with its own computation."""


@pytest.mark.parametrize(
    ("linear", "fan_in_fan_out", "fused"),
    [
        (nn.Linear(4, 4), False, True),
        (Conv1D(4, 4), True, True),
        (CustomLinear(4, 4), False, False),
        (nn.Linear(4, 4), True, False),  # PEFT corrects fan_in_fan_out
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_unsupported_linear_uses_peft_layer(linear, fan_in_fan_out, fused):
    from ftlevel.fast.fused_lora import register_fused_layers

    config = peft.LoraConfig(target_modules=["0"], fan_in_fan_out=fan_in_fan_out)
    register_fused_layers(config)
    layer = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    assert isinstance(layer, FusedLinear) is fused
    assert isinstance(layer, peft.tuners.lora.Linear)


def test_hooks_and_dora_use_peft_layer():
    model, calls = build("llama", fused=True), []
    fused_layers(model)[0].base_layer.register_forward_hook(lambda *_: calls.append(1))
    model(**tiny_models.build_batch("llama"))
    assert calls
    models = [build("llama", fused=fused, use_dora=True) for fused in (True, False)]
    actual, expected = (backward(model, "llama") for model in models)
    assert actual[0] == expected[0]
    assert all(torch.equal(actual[1][name], expected[1][name]) for name in actual[1])
