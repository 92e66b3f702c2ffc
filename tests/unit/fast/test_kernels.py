"""Tests that the Triton kernels match torch and are used only where they match and are faster.

The kernels run in float32 in Triton's interpreter; `tests/gpu` runs them on a GPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from ftlevel.fast import fused_layers as rope
from ftlevel.fast import kernels
from ftlevel.fast.cross_entropy import ChunkedCrossEntropy
from ftlevel.fast.fused_layers import FusedNormGlu, FusedRope
from ftlevel.fast.kernels import ACTIVATIONS, TORCH, TorchBackend, TritonBackend
from tiny_models import build

ROWS = (2, 5)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run Triton kernels on the CPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton (pip install triton), whose interpreter runs without a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(actual: Any, expected: Any, rounding: float = 5e-7) -> None:
    """Compare with values of higher precision; `rounding` is relative to the largest value."""
    for a, b in zip(actual, expected, strict=True):
        size = float(b.abs().max())
        torch.testing.assert_close(a, b.float(), rtol=2e-5, atol=rounding * size)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("width", [1, 64, 100, 1025])
def test_norm_matches_torch(width: int) -> None:
    x, gradient, weight = draw(0, *ROWS, width), draw(1, *ROWS, width), draw(2, width)
    triton = TritonBackend()
    actual, expected = triton.norm(x, weight, 1e-5), TORCH.norm(x, weight, 1e-5)
    assert_same(actual, expected)
    scale = expected[1]
    assert torch.equal(triton.renorm(x, weight, actual[1]), actual[0])
    assert_same(
        [triton.norm_backward(gradient, x, weight, scale)],
        [TORCH.norm_backward(gradient, x, weight, scale)],
    )


@pytest.mark.usefixtures("interpreter")
def test_norm_of_noncontiguous_input_matches_torch() -> None:
    x, weight = draw(0, 4, 6, 10).transpose(0, 1), draw(2, 10)
    assert not x.is_contiguous()
    assert_same(TritonBackend().norm(x, weight, 1e-5), TORCH.norm(x, weight, 1e-5))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_glu_matches_torch(kind: str) -> None:
    gate, up, gradient = (3 * draw(seed, *ROWS, 1100) for seed in range(3))
    exact = [part.double() for part in (gradient, gate, up)]
    triton = TritonBackend()
    assert_same([triton.glu(kind, gate, up)], [TORCH.glu(kind, *exact[1:])])
    actual = triton.glu_backward(kind, gradient, gate, up)
    assert_same(actual, TORCH.glu_backward(kind, *exact))


@pytest.mark.usefixtures("interpreter")
def test_norm_with_float16_or_float32_weight_matches_torch() -> None:
    x, weight = draw(0, 3, 64).half(), draw(1, 64)
    for norm_weight in (weight, weight.half()):
        actual, expected = (
            TritonBackend().norm(x, norm_weight, 1e-5),
            TORCH.norm(x, norm_weight, 1e-5),
        )
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-3, atol=1e-3)
        assert actual[0].dtype == torch.float16


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("heads", "width", "rows"), [((4, 2), 16, 1), ((3, 3), 12, 2)])
def test_rope_matches_torch(heads: tuple[int, int], width: int, rows: int, backward: bool) -> None:
    q, k = (draw(seed, 2, 5, count, width) for seed, count in enumerate(heads))
    cos, sin = (
        draw(seed, rows, 5, width) for seed in (2, 3)
    )  # not real angles: the two halves differ
    actual = TritonBackend().rope(q, k, cos, sin, backward=backward)
    assert_same(actual, TORCH.rope(q, k, cos, sin, backward=backward))


def test_rope_backward_matches_autograd() -> None:
    q, k, cos, sin = (draw(seed, 2, 5, 3, 8).double() for seed in range(4))
    cos, sin = cos[:, :, 0], sin[:, :, 0]
    leaves = [part.requires_grad_() for part in (q, k)]
    rotated, gradients = TORCH.rope(*leaves, cos, sin), (draw(5, *q.shape), draw(6, *k.shape))
    expected = torch.autograd.grad(rotated, leaves, [part.double() for part in gradients])
    actual = TORCH.rope(*(part.double() for part in gradients), cos, sin, backward=True)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("vocabulary", [5, 4096, 10_001])
def test_cross_entropy_and_gradient_match_torch(vocabulary: int, smoothing: float) -> None:
    logits = 5 * draw(0, 4, vocabulary)
    logits[1, 2:] = float("-inf") if not smoothing else -80.0  # the only logits of one block
    targets = torch.tensor([0, 1, vocabulary - 1, vocabulary // 2])
    actual = TritonBackend().cross_entropy(logits, targets, smoothing)
    exact_logits = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        exact_logits, targets, reduction="none", label_smoothing=smoothing
    )
    assert_same(actual, [expected.detach(), torch.autograd.grad(expected.sum(), exact_logits)[0]])


@pytest.mark.usefixtures("interpreter")
def test_cross_entropy_of_invalid_target_is_nan() -> None:
    for target in (-100, 8):
        losses, _ = TritonBackend().cross_entropy(draw(0, 1, 8), torch.tensor([target]), 0.0)
        assert losses.isnan().all()


class FixedKernels(kernels.Kernels):
    """Always selects the same backend for every operation."""

    formulas: TorchBackend = TORCH

    def norm(self, *_: Any) -> TorchBackend:
        """Return `formulas`."""
        return self.formulas

    glu = rope = cross_entropy = norm


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_model_gradients_match_with_triton_and_torch(family: str) -> None:
    def loss_and_gradients(formulas: TorchBackend) -> list[torch.Tensor]:
        backend = type("Chosen", (FixedKernels,), {"formulas": formulas})()
        torch.manual_seed(0)
        model = build(family).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name)
        parts = [FusedNormGlu(model, backend), FusedRope(model, backend)]
        assert all(part.count for part in parts)
        head = ChunkedCrossEntropy(model, backend)
        ids = torch.arange(12)[None] + 5
        positions, targets = torch.arange(11), ids[0, 1:]
        loss = head.loss_sum(lambda: model(input_ids=ids, use_cache=False), positions, targets)
        loss.backward()
        for part in (*parts, head):
            part.remove()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    assert_same(
        loss_and_gradients(TritonBackend()), loss_and_gradients(TORCH), rounding=2e-6
    )  # whole model: 5e-7 on AMD, 9e-7 on Intel


def test_fused_rope_keeps_logits_and_remove_restores_function() -> None:
    from transformers.models.llama import modeling_llama

    model, original = build("llama").eval(), modeling_llama.apply_rotary_pos_emb
    ids = torch.arange(12)[None] + 5
    expected = model(ids).logits
    fused = FusedRope(model, kernels.Kernels())
    assert fused.count == 1
    assert modeling_llama.apply_rotary_pos_emb is not original
    assert torch.equal(model(ids).logits, expected)
    second = FusedRope(model, kernels.Kernels())
    assert second.count == 0, "another step's stays"
    second.remove()
    fused.remove()
    assert modeling_llama.apply_rotary_pos_emb is original


def test_other_rope_variants_are_not_fused() -> None:
    from transformers.models.cohere import modeling_cohere

    assert not rope.is_rope(modeling_cohere.apply_rotary_pos_emb)  # pairs, not halves
    assert FusedRope(build("gpt2"), kernels.Kernels()).count == 0


def test_kernels_infer_shapes_on_meta_tensors() -> None:
    x, weight = torch.empty(2, 3, 8, device="meta", dtype=torch.bfloat16), torch.empty(8)
    y, scale = TritonBackend().norm(x, weight.to("meta"), 1e-5)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert (scale.shape, scale.dtype) == ((2, 3, 1), torch.float32)
    gate_gradient, up_gradient = TritonBackend().glu_backward("silu", x, x, x)
    assert gate_gradient.shape == up_gradient.shape == x.shape
    q, k, angles = x[:, :, None], x[:, :, None], x[:1]
    assert [part.shape for part in TritonBackend().rope(q, k, angles, angles)] == [q.shape] * 2
    logits, targets = x[0], torch.empty(3, device="meta", dtype=torch.long)
    losses, gradient = TritonBackend().cross_entropy(logits, targets, 0.0)
    assert (losses.shape, losses.dtype) == ((3,), torch.float32)
    assert (gradient.shape, gradient.dtype) == (logits.shape, logits.dtype)


def test_torch_is_used_on_cpu_and_without_triton(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert kernels.Kernels().norm(64, torch.float32, torch.float32, "cpu") is TORCH
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda _: None)
    assert not kernels.supports_triton("cuda", torch.bfloat16)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda _: True)
    assert kernels.supports_triton("cuda", torch.bfloat16)
    assert not kernels.supports_triton("cuda", torch.float64)
    assert kernels.NO_KERNELS.glu("silu", 64, torch.bfloat16, "cuda") is TORCH


class ScaledTorchBackend(TorchBackend):
    """Stands in for compiled kernels: torch's values times `factor`."""

    factor, fails = 1.0, False

    def glu(self, kind: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return torch's GLU times `factor`, or raise if `fails`."""
        if self.fails:
            raise RuntimeError("PassManager::run failed")
        return super().glu(kind, gate, up) * self.factor


@pytest.mark.parametrize(
    ("attributes", "seconds", "is_used"),
    [
        ({}, (1.0, 2.0), True),
        ({"factor": 1.001}, (1.0, 2.0), True),  # half a unit in bfloat16's last place
        ({}, (2.0, 1.0), False),
        ({"factor": 1.05}, (1.0, 2.0), False),
        ({"factor": float("nan")}, (1.0, 2.0), False),
        ({"fails": True}, (1.0, 2.0), False),
    ],
)
def test_kernel_is_selected_only_if_accurate_and_faster(
    attributes: dict[str, Any], seconds: tuple[float, float], is_used: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    backend = type("Kernels", (ScaledTorchBackend,), attributes)
    monkeypatch.setattr(kernels, "TritonBackend", backend)
    monkeypatch.setattr(kernels, "supports_triton", lambda *_: True)
    monkeypatch.setattr(kernels, "TOKENS", 8)
    monkeypatch.setattr(kernels, "_selected", {})
    monkeypatch.setattr(
        kernels, "time", lambda _, formulas, __: seconds[not isinstance(formulas, backend)]
    )
    selected = kernels.select_glu.__wrapped__("silu", 96, torch.bfloat16, "cpu")
    assert isinstance(selected, backend) == is_used
    assert is_used or selected is TORCH
    used_kernels = kernels.get_used_kernels()
    assert used_kernels == {"silu GLU 96 wide in torch.bfloat16": is_used}
