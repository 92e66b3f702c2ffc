"""Second moments of what linears are given, against sums over the inputs themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ftlevel.data.encoding.encode import Encoded
from ftlevel.evaluation.two_models import EvalSet
from ftlevel.merging import low_bits
from ftlevel.merging.low_bits import InputMoments
from ftlevel.tasks import TASKS

ROWS = [[5, 9, 3, 7, 11], [8, 2], [6, 6, 1], [4, 3, 2, 1], [9, 9, 9, 1, 2, 3]]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def model(tiny_model_dir: Callable[..., Path]) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama")).eval()


def ask(model: Any, sizes: dict[str, int], dtype: str = "float32") -> InputMoments:
    objective = TASKS["text-generation"].create_objective("decoder", {})
    rows = [Encoded(ids, ids, index) for index, ids in enumerate(ROWS)]
    return InputMoments(model, EvalSet(rows, objective, 0, "cpu"), dtype, sizes)


def sizes_of(model: Any) -> dict[str, int]:
    return {name: module.in_features for name, module in model.named_modules()
            if name.endswith(LINEARS)}  # fmt: skip


def moment(model: Any, name: str) -> torch.Tensor:
    """Return E[x xᵀ] of rows that are asked one by one, without padding."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
    with torch.no_grad():
        for ids in ROWS:
            model(torch.tensor([ids]))
    hook.remove()
    inputs = torch.cat(seen)
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("most", [1 << 30, 4 * 64 * 64 * 3])
def test_moments_are_those_of_the_inputs_without_padding(
    model: Any, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_bits, "MAX_BYTES", most)
    sizes = sizes_of(model)
    found = ask(model, sizes)
    for name in sizes:
        torch.testing.assert_close(found.of(name), moment(model, name), rtol=1e-4, atol=1e-6)
    assert (found.passes == 1) == (most == 1 << 30)


def test_sums_are_not_rounded_where_the_model_computes_in_bfloat16(model: Any) -> None:
    name = "model.layers.0.self_attn.q_proj"
    found = ask(model, {name: 64}, "bfloat16").of(name)
    assert found is not None
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())


def test_a_linear_that_no_row_reaches_has_none(model: Any) -> None:
    model.spare = torch.nn.Linear(4, 4)
    found = ask(model, {"spare": 4, "model.layers.0.mlp.down_proj": 128})
    assert found.of("spare") is None
    assert found.of("model.layers.0.mlp.down_proj") is not None
    del model.spare
