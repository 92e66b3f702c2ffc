"""Tests that fused norms and GLUs match the model; other formulas are not replaced."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma3nTextConfig
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4MLP
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP
from transformers.models.lara_mini.modeling_lara_mini import LaraMiniRMSNormGated
from transformers.models.mamba2.modeling_mamba2 import Mamba2RMSNormGated
from transformers.models.step3p7.modeling_step3p7 import Step3p7MLP
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

import tiny_models
from ftlevel.fast.fused_layers import FusedGlu, FusedNorm, FusedNormGlu

COUNTS = {"llama": (5, 2), "qwen3": (9, 2), "gemma3_text": (13, 2), "phi3": (5, 0),
          "qwen3_moe": (9, 0), "t5": (12, 0), "gpt2": (0, 0), "bert": (0, 0),
          "modernbert": (0, 0)}  # fmt: skip


@pytest.mark.parametrize("family", COUNTS)
def test_norms_and_glus_are_replaced_and_restored(family):
    model = tiny_models.build(family).requires_grad_(False)
    names, state = [n for n, _ in model.named_parameters()], model.state_dict()
    fused = FusedNormGlu(model)
    kinds = [type(module) for module in model.modules()]
    assert (kinds.count(FusedNorm), kinds.count(FusedGlu)) == COUNTS[family]
    assert fused.count == sum(COUNTS[family])
    assert [n for n, _ in model.named_parameters()] == names
    assert model.state_dict().keys() == state.keys()
    fused.remove()
    assert not any(isinstance(m, FusedNorm | FusedGlu) for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "t5"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
def test_fused_model_matches_logits_and_gradients(family, dtype, bound):
    dropout = {"dropout_rate": 0.0} if family == "t5" else {}
    model = tiny_models.build(family, **dropout).requires_grad_(False).to(dtype).train()
    embeddings = model.get_input_embeddings().requires_grad_(True)
    batch = tiny_models.build_batch(family, None)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(**batch).logits.float()
        loss = logits.square().mean() + logits.flatten()[::7].sum()
        (gradient,) = torch.autograd.grad(loss, [embeddings.weight])
        return logits, gradient.float()

    expected = step()
    fused = FusedNormGlu(model)
    assert fused.count
    for a, b in zip(step(), expected, strict=True):
        assert (a - b).norm() <= bound * b.norm()
    model.eval()
    with torch.no_grad():
        evaluated = model(**batch).logits
        fused.remove()
        assert torch.equal(evaluated, model(**batch).logits)


def test_fused_layers_gradcheck():
    torch.manual_seed(0)
    base = tiny_models.build("llama").requires_grad_(False).double().train()
    norm, mlp = base.model.norm, base.model.layers[0].mlp
    norm.weight.copy_(torch.randn_like(norm.weight))
    x = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(FusedNorm(norm, 0.0, False).train(), (x,))
    assert torch.autograd.gradcheck(FusedNorm(norm, 1.0, True).train(), (x,))
    assert torch.autograd.gradcheck(FusedGlu(mlp, "silu").train(), (x,))
    assert torch.autograd.gradcheck(FusedGlu(mlp, "gelu_tanh").train(), (x,))


class UnknownNorm(nn.Module):
    """Looks like a norm, but computes another formula."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.variance_epsilon)


def test_unsupported_modules_are_not_replaced():
    model = tiny_models.build("llama").requires_grad_(False)
    layer = model.model.layers[0]
    layer.input_layernorm = UnknownNorm(layer.input_layernorm)
    layer.post_attention_layernorm.weight.requires_grad_(True)
    layer.mlp.register_forward_hook(lambda *_: None)
    before = dict(model.named_modules())
    fused = FusedNormGlu(model)
    after = dict(model.named_modules())
    for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
        assert after[f"model.layers.0.{name}"] is before[f"model.layers.0.{name}"]
    assert fused.count == 7 - 3


def test_glus_that_clamp_or_select_are_not_replaced():
    """These classes have the layers of a GLU, and some of their layers compute a GLU."""
    config: Any = SimpleNamespace(
        hidden_size=8, intermediate_size=16, mlp_bias=False, hidden_act="silu", swiglu_limit=10.0,
        swiglu_limits_shared=[0.0, 16.0],
    )  # fmt: skip
    sparse = Gemma3nTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        activation_sparsity_pattern=[0.0, 0.95],
    )  # fmt: skip
    modules = [
        Step3p7MLP(config, 0), Step3p7MLP(config, 1), DeepseekV4MLP(config),
        Gemma3nTextMLP(sparse, 0), Gemma3nTextMLP(sparse, 1),
    ]  # fmt: skip
    model = nn.ModuleList(modules).requires_grad_(False)
    FusedNormGlu(model)
    replaced = [isinstance(module, FusedGlu) for module in model]
    assert replaced == [True, False, False, True, False]


def test_fused_layers_save_fewer_bytes():
    model = tiny_models.build("llama").requires_grad_(False).to(torch.bfloat16).train()
    layer = model.model.layers[0]
    x = torch.randn(1, 50, 64).to(torch.bfloat16).requires_grad_()

    def get_saved_bytes(module: nn.Module) -> int:
        storages: dict[int, int] = {}

        def record(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
            module(x)
        return sum(storages.values())

    norm = copy.deepcopy(layer.input_layernorm)
    assert get_saved_bytes(FusedNorm(norm, 0.0, False).train()) < 0.6 * get_saved_bytes(norm)
    assert get_saved_bytes(FusedGlu(layer.mlp, "silu").train()) < get_saved_bytes(layer.mlp)


@pytest.mark.parametrize(
    "norm", [Mamba2RMSNormGated(8, 8), Zamba2RMSNormGated(8, 8), LaraMiniRMSNormGated(8)], ids=str
)
def test_norms_with_a_gate_are_not_replaced(norm):
    """Models always call such a norm with a gate, without which it is a plain norm."""
    model = nn.ModuleDict({"norm": norm}).requires_grad_(False).train()
    x, gate = torch.randn(2, 3, 8).requires_grad_(), torch.randn(2, 3, 8)
    expected = norm(x, gate)
    assert FusedNormGlu(model).count == 0
    torch.testing.assert_close(model["norm"](x, gate), expected, rtol=0, atol=0)
