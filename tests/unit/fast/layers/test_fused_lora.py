"""The fused low-rank layers are PEFT's in everything but the way that they compute."""

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
from ftlevel.fast.fused_lora import FusedForward, FusedLinear, FusedLoraFunction
from ftlevel.methods import Base
from ftlevel.models.hardware import autocast
from ftlevel.models.module_tree import get_heads
from ftlevel.trained.adapt import apply_method
from ftlevel.training.plan.method import resolve_method_targets
from matrix_cells import pristine

HEADS = {"llama": "causal", "gpt2": "causal", "bert": "seqcls", "t5": "seq2seq"}
KINDS = {"encoder": "bert", "encoder-decoder": "t5"}
FORMS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    {"bias": "all"},
    {"lora_dropout": 0.3},
]


def build(family: str, quant: str = "none", *, fused: bool, dtype: str = "float32", **fields):
    """Return a tiny model with LoRA whose B is not zero, in training mode."""
    torch.manual_seed(0)
    head = HEADS[family]
    model = copy.deepcopy(pristine(family, head, quant))
    if dtype == "bfloat16" and quant == "none":
        model = model.to(torch.bfloat16)
    for module in model.modules():
        if dtype == "bfloat16" and quant == "4bit" and hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.bfloat16
    spec = SPECS["lora"](**{"r": 4, "lora_alpha": 8.0, **fields})
    found = resolve_method_targets(spec, model, family, quant)
    kind = {"bert": "encoder", "t5": "encoder-decoder"}.get(family, "decoder")
    heads = get_heads(model) if head == "seqcls" else []
    task = {"causal": "CAUSAL_LM", "seqcls": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}[head]
    facts = Base(model.config, kind, task, found.modules, heads, found.fan_in_fan_out, 10)
    model = apply_method(model, spec, facts, fused=fused)
    randomize(model)
    return model.train()


def randomize(model) -> None:
    """Draw every B anew: at zero, most gradients would be zero."""
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


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def fused_layers(model) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, FusedForward)]


@pytest.mark.parametrize("quant", ["none", "4bit", "8bit"])
@pytest.mark.parametrize("family", HEADS)
def test_loss_and_gradients_are_pefts_in_float32(family, quant):
    loss, grads = backward(build(family, quant, fused=True), family)
    expected_loss, expected = backward(build(family, quant, fused=False), family)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert relative(grad, expected[name]) < 1e-5, name


@pytest.mark.parametrize("quant", ["none", "4bit", "8bit"])
@pytest.mark.parametrize("family", HEADS)
def test_every_linear_is_one_function(family, quant, monkeypatch):
    calls = []
    real = FusedLoraFunction.forward
    monkeypatch.setattr(
        FusedLoraFunction,
        "forward",
        staticmethod(lambda ctx, *a: (calls.append(1), real(ctx, *a))[1]),
    )
    model = build(family, quant, fused=True)
    backward(model, family)
    linears = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(calls) == len(linears) == len(fused_layers(model)) > 0


@pytest.mark.parametrize("quant", ["none", "4bit", "8bit"])
@pytest.mark.parametrize("family", HEADS)
def test_bfloat16_is_as_near_to_float32_as_pefts(family, quant):
    _, exact = backward(build(family, quant, fused=False), family)
    errors = []
    for fused in (True, False):
        _, grads = backward(build(family, quant, fused=fused, dtype="bfloat16"), family, "bfloat16")
        errors.append(sum(relative(grads[name], exact[name]) for name in exact) / len(exact))
    assert errors[0] < 1.1 * errors[1] < 0.1


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_every_form_is_pefts(fields):
    loss, grads = backward(build("llama", fused=True, **fields), "llama")
    expected_loss, expected = backward(build("llama", fused=False, **fields), "llama")
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, grad in grads.items():
        assert relative(grad, expected[name]) < 1e-5, name


def test_node_has_the_derivatives_of_its_formula():
    torch.manual_seed(0)
    x, dropped, a, b, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 5), (2, 3, 5), (2, 5), (4, 2), (4,))
    )
    weight = torch.randn(4, 5, dtype=torch.float64)
    for source in (None, dropped):
        for shift in (None, bias):
            inputs = (x, source, a, b, shift, lambda: weight, 1.7)
            y = FusedLoraFunction.apply(*inputs)
            plain = x if source is None else source
            expected = nn.functional.linear(x, weight, shift) + 1.7 * plain @ a.T @ b.T
            torch.testing.assert_close(y, expected)
            assert torch.autograd.gradcheck(FusedLoraFunction.apply, inputs)


def test_dropout_in_bfloat16_is_drawn_from_the_seed():
    model = build("llama", fused=True, dtype="bfloat16", lora_dropout=0.5)
    first, grads = backward(model, "llama", "bfloat16")
    grads = {name: grad.clone() for name, grad in grads.items()}
    again, same = backward(model, "llama", "bfloat16")
    assert first == again
    assert all(torch.equal(grads[name], same[name]) for name in grads)
    layer = fused_layers(model)[0]
    x = torch.ones(4000, layer.in_features, dtype=torch.bfloat16)
    mean = (layer(x) - layer.base_layer(x)).float().mean(0)
    layer.lora_dropout["default"] = nn.Identity()
    expected = (layer(x[:1]) - layer.base_layer(x[:1])).float()[0]
    assert relative(mean, expected) < 0.05


def test_checkpointing_changes_no_bit():
    model = build("llama", fused=True, lora_dropout=0.3)
    loss, grads = backward(model, "llama")
    grads = {name: grad.clone() for name, grad in grads.items()}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    again, same = backward(model, "llama")
    assert loss == again
    assert all(torch.equal(grads[name], same[name]) for name in grads)


def test_a_trained_head_beside_it_gets_its_gradient():
    _, grads = backward(build("bert", fused=True), "bert")
    assert any(".modules_to_save." in name and grad.abs().sum() > 0 for name, grad in grads.items())


@pytest.mark.parametrize("quant", ["none", "4bit", "8bit"])
def test_several_adapters_switch_and_switch_off_as_pefts(quant):
    models = [build("llama", quant, fused=fused) for fused in (True, False)]
    batch = {k: v for k, v in tiny_models.build_batch("llama").items() if k != "labels"}
    for model in models:
        torch.manual_seed(5)
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
        randomize(model)
    for active in ("default", "other", ["default", "other"]):
        for model in models:
            model.base_model.set_adapter(active)
        ours, pefts = (model(**batch).logits for model in models)
        assert relative(ours, pefts) < 1e-5
    with models[0].disable_adapter(), models[1].disable_adapter():
        assert torch.equal(*(model(**batch).logits for model in models))
    assert torch.equal(*(model.eval()(**batch).logits for model in models))


@pytest.mark.parametrize("quant", ["none", "4bit", "8bit"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merging_gives_the_bits_of_pefts(family, quant):
    merged = []
    for fused in (True, False):
        model = build(family, quant, fused=fused)
        backward(model, family)  # bitsandbytes has moved its 8-bit state
        model.merge_adapter()
        if quant == "none":  # a quantized weight does not come back bit for bit
            model.unmerge_adapter()
        merged.append(model.merge_and_unload().state_dict())
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


def test_what_is_saved_is_a_plain_lora(tmp_path):
    for fused in (True, False):
        build("llama", fused=fused).save_pretrained(tmp_path / str(fused))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert filecmp.cmp(tmp_path / "True" / name, tmp_path / "False" / name, shallow=False)
    loaded = peft.PeftModel.from_pretrained(
        copy.deepcopy(pristine("llama", "causal", "none")), tmp_path / "True"
    )
    assert not fused_layers(loaded)
    batch = tiny_models.build_batch("llama")
    expected = build("llama", fused=True).eval()(**batch).logits
    assert torch.equal(loaded(**batch).logits, expected)


class OwnLinear(nn.Linear):
    """A linear that is computed in another way."""


@pytest.mark.parametrize(
    ("linear", "fan_in_fan_out", "fused"),
    [
        (nn.Linear(4, 4), False, True),
        (Conv1D(4, 4), True, True),
        (OwnLinear(4, 4), False, False),
        (nn.Linear(4, 4), True, False),  # PEFT corrects the config
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_other_linears_get_pefts_layer(linear, fan_in_fan_out, fused):
    from ftlevel.fast.fused_lora import register_fused_layers

    config = peft.LoraConfig(target_modules=["0"], fan_in_fan_out=fan_in_fan_out)
    register_fused_layers(config)
    layer = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    assert isinstance(layer, FusedLinear) is fused
    assert isinstance(layer, peft.tuners.lora.Linear)


def test_hooks_and_dora_are_left_to_peft():
    batch = tiny_models.build_batch("llama")
    seen = []
    model = build("llama", fused=True)
    layer = fused_layers(model)[0]
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    model(**batch)
    assert seen
    ours, pefts = (backward(build("llama", fused=f, use_dora=True), "llama") for f in (True, False))
    assert ours[0] == pefts[0]
    assert all(torch.equal(ours[1][name], pefts[1][name]) for name in ours[1])
