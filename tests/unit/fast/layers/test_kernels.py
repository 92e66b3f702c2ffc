"""The Triton kernels give what torch's operations give, and are used only where they do.

The kernels run in Triton's interpreter, in float32: what a GPU makes of them, `tests/gpu` asks.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from ftlevel.fast.layers import kernels
from ftlevel.fast.layers.formulas import ACTIVATIONS, TORCH, TorchFormulas
from ftlevel.fast.layers.kernels.operators import TritonFormulas
from ftlevel.fast.layers.norm_glu import FusedNormGlu
from tiny_models import build

ROWS = (2, 5)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's programs run on the CPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton (pip install triton), whose interpreter runs without a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(found: Any, expected: Any) -> None:
    """Compare with numbers that may be exacter: float32 rounds at 6e-8 of the largest."""
    for one, other in zip(found, expected, strict=True):
        size = float(other.abs().max())
        torch.testing.assert_close(one, other.float(), rtol=2e-5, atol=5e-7 * size)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("width", [1, 64, 100, 1025])
def test_a_norm_is_torchs(width: int) -> None:
    x, gradient, weight = draw(0, *ROWS, width), draw(1, *ROWS, width), draw(2, width)
    ours = TritonFormulas()
    found, expected = ours.norm(x, weight, 1e-5), TORCH.norm(x, weight, 1e-5)
    assert_same(found, expected)
    scale = expected[1]
    assert torch.equal(ours.renorm(x, weight, found[1]), found[0])
    assert_same(
        [ours.norm_backward(gradient, x, weight, scale)],
        [TORCH.norm_backward(gradient, x, weight, scale)],
    )


@pytest.mark.usefixtures("interpreter")
def test_a_norm_of_a_view_is_that_of_its_numbers() -> None:
    x, weight = draw(0, 4, 6, 10).transpose(0, 1), draw(2, 10)
    assert not x.is_contiguous()
    assert_same(TritonFormulas().norm(x, weight, 1e-5), TORCH.norm(x, weight, 1e-5))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_glu_is_torchs(kind: str) -> None:
    gate, up, gradient = (3 * draw(seed, *ROWS, 1100) for seed in range(3))
    exact = [part.double() for part in (gradient, gate, up)]
    ours = TritonFormulas()
    assert_same([ours.glu(kind, gate, up)], [TORCH.glu(kind, *exact[1:])])
    found = ours.glu_backward(kind, gradient, gate, up)
    assert_same(found, TORCH.glu_backward(kind, *exact))


@pytest.mark.usefixtures("interpreter")
def test_a_norm_multiplies_where_the_weight_says() -> None:
    x, weight = draw(0, 3, 64).half(), draw(1, 64)
    for wide in (weight, weight.half()):
        found, expected = TritonFormulas().norm(x, wide, 1e-5), TORCH.norm(x, wide, 1e-5)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-3)
        assert found[0].dtype == torch.float16


@pytest.mark.usefixtures("interpreter")
def test_a_model_learns_the_same_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(formulas: Any) -> list[torch.Tensor]:
        monkeypatch.setattr(kernels, "choose_norm", lambda *_: formulas)
        monkeypatch.setattr(kernels, "choose_glu", lambda *_: formulas)
        torch.manual_seed(0)
        model = build("llama").train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name)
        assert FusedNormGlu(model).count
        ids = torch.arange(12)[None] + 5
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    assert_same(gradients(TritonFormulas()), gradients(TORCH))


def test_shapes_are_known_without_numbers() -> None:
    x, weight = torch.empty(2, 3, 8, device="meta", dtype=torch.bfloat16), torch.empty(8)
    y, scale = TritonFormulas().norm(x, weight.to("meta"), 1e-5)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert (scale.shape, scale.dtype) == ((2, 3, 1), torch.float32)
    of_gate, of_up = TritonFormulas().glu_backward("silu", x, x, x)
    assert of_gate.shape == of_up.shape == x.shape


def test_a_cpu_and_a_machine_without_triton_compute_as_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert kernels.choose_norm(64, torch.float32, torch.float32, "cpu") is TORCH
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda _: None)
    assert not kernels.can_serve("cuda", torch.bfloat16)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda _: True)
    assert kernels.can_serve("cuda", torch.bfloat16)
    assert not kernels.can_serve("cuda", torch.float64)


class Like(TorchFormulas):
    """Stands for kernels that are compiled: torch's numbers times `factor`."""

    factor, fails = 1.0, False

    def glu(self, kind: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return them."""
        if self.fails:
            raise RuntimeError("PassManager::run failed")
        return super().glu(kind, gate, up) * self.factor


@pytest.mark.parametrize(
    ("change", "seconds", "is_used"),
    [
        ({}, (1.0, 2.0), True),
        ({"factor": 1.001}, (1.0, 2.0), True),  # half a unit in bfloat16's last place
        ({}, (2.0, 1.0), False),
        ({"factor": 1.05}, (1.0, 2.0), False),
        ({"factor": float("nan")}, (1.0, 2.0), False),
        ({"fails": True}, (1.0, 2.0), False),
    ],
)
def test_kernels_are_used_where_they_agree_and_are_faster(
    change: dict[str, Any], seconds: tuple[float, float], is_used: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    mine = type("Kernels", (Like,), change)
    monkeypatch.setattr(kernels, "TritonFormulas", mine)
    monkeypatch.setattr(kernels, "can_serve", lambda *_: True)
    monkeypatch.setattr(kernels, "TOKENS", 8)
    monkeypatch.setattr(kernels, "_chosen", {})
    monkeypatch.setattr(
        kernels, "time", lambda _, formulas, __: seconds[not isinstance(formulas, mine)]
    )
    chosen = kernels.choose_glu.__wrapped__("silu", 96, torch.bfloat16, "cpu")
    assert isinstance(chosen, mine) == is_used
    assert is_used or chosen is TORCH
    said = kernels.describe_choices()
    assert said == {"silu GLU 96 wide in torch.bfloat16": is_used}
