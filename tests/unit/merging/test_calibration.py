"""Second moments of linear layer inputs, against sums over the recorded inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ftlevel.data.encoding.row import Encoded
from ftlevel.evaluation.two_models import EvalSet
from ftlevel.merging import low_bits
from ftlevel.merging.low_bits import InputMoments
from ftlevel.tasks import TASKS

ROWS = [[5, 9, 3, 7, 11], [8, 2], [6, 6, 1], [4, 3, 2, 1], [9, 9, 9, 1, 2, 3]]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def model(tiny_model_dir: Callable[..., Path]) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama")).eval()


def compute_moments(model: Any, sizes: dict[str, int], dtype: str = "float32") -> InputMoments:
    objective = TASKS["text-generation"].create_objective("decoder", {})
    rows = [Encoded(ids, ids, index) for index, ids in enumerate(ROWS)]
    return InputMoments(model, EvalSet(rows, objective, 0, "cpu"), dtype, sizes)


def get_sizes(model: Any) -> dict[str, int]:
    return {name: module.in_features for name, module in model.named_modules()
            if name.endswith(LINEARS)}  # fmt: skip


def reference_moment(model: Any, name: str) -> torch.Tensor:
    """Return E[x xᵀ] of rows processed one by one, without padding."""
    recorded: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, x: recorded.append(x[0][0])
    )
    with torch.no_grad():
        for ids in ROWS:
            model(torch.tensor([ids]))
    hook.remove()
    inputs = torch.cat(recorded)
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("max_bytes", [1 << 30, 4 * 64 * 64 * 3])
def test_moments_match_inputs_without_padding(model, max_bytes, monkeypatch):
    monkeypatch.setattr(low_bits, "MAX_BYTES", max_bytes)
    sizes = get_sizes(model)
    moments = compute_moments(model, sizes)
    for name in sizes:
        expected = reference_moment(model, name)
        torch.testing.assert_close(moments.of(name), expected, rtol=1e-4, atol=1e-6)
    assert (moments.passes == 1) == (max_bytes == 1 << 30)


def test_moments_of_bfloat16_model_are_float32(model):
    name = "model.layers.0.self_attn.q_proj"
    moment = compute_moments(model, {name: 64}, "bfloat16").of(name)
    assert moment.dtype == torch.float32
    assert not torch.equal(moment, moment.bfloat16().float())


def test_unused_linear_layer_has_no_moment(model):
    model.spare = torch.nn.Linear(4, 4)
    moments = compute_moments(model, {"spare": 4, "model.layers.0.mlp.down_proj": 128})
    assert moments.of("spare") is None
    assert moments.of("model.layers.0.mlp.down_proj") is not None
    del model.spare
