"""The Triton kernels give what torch's operations give, and are used only where they do.

The kernels run in Triton's interpreter, in float32: what a GPU makes of them, `tests/gpu` asks.
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
    """Let Triton's programs run on the CPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton (pip install triton), whose interpreter runs without a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(found: Any, expected: Any, rounding: float = 5e-7) -> None:
    """Compare with values that may be more exact; `rounding` is relative to the largest."""
    for one, other in zip(found, expected, strict=True):
        size = float(other.abs().max())
        torch.testing.assert_close(one, other.float(), rtol=2e-5, atol=rounding * size)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("width", [1, 64, 100, 1025])
def test_a_norm_is_torchs(width: int) -> None:
    x, gradient, weight = draw(0, *ROWS, width), draw(1, *ROWS, width), draw(2, width)
    ours = TritonBackend()
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
    assert_same(TritonBackend().norm(x, weight, 1e-5), TORCH.norm(x, weight, 1e-5))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_glu_is_torchs(kind: str) -> None:
    gate, up, gradient = (3 * draw(seed, *ROWS, 1100) for seed in range(3))
    exact = [part.double() for part in (gradient, gate, up)]
    ours = TritonBackend()
    assert_same([ours.glu(kind, gate, up)], [TORCH.glu(kind, *exact[1:])])
    found = ours.glu_backward(kind, gradient, gate, up)
    assert_same(found, TORCH.glu_backward(kind, *exact))


@pytest.mark.usefixtures("interpreter")
def test_a_norm_multiplies_where_the_weight_says() -> None:
    x, weight = draw(0, 3, 64).half(), draw(1, 64)
    for wide in (weight, weight.half()):
        found, expected = TritonBackend().norm(x, wide, 1e-5), TORCH.norm(x, wide, 1e-5)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-3)
        assert found[0].dtype == torch.float16


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("heads", "width", "rows"), [((4, 2), 16, 1), ((3, 3), 12, 2)])
def test_rotary_embeddings_are_torchs(
    heads: tuple[int, int], width: int, rows: int, backward: bool
) -> None:
    q, k = (draw(seed, 2, 5, count, width) for seed, count in enumerate(heads))
    cos, sin = (draw(seed, rows, 5, width) for seed in (2, 3))  # no angles: halves that differ
    found = TritonBackend().rope(q, k, cos, sin, backward=backward)
    assert_same(found, TORCH.rope(q, k, cos, sin, backward=backward))


def test_the_backward_rotation_is_autograds() -> None:
    q, k, cos, sin = (draw(seed, 2, 5, 3, 8).double() for seed in range(4))
    cos, sin = cos[:, :, 0], sin[:, :, 0]
    leaves = [part.requires_grad_() for part in (q, k)]
    turned, along = TORCH.rope(*leaves, cos, sin), (draw(5, *q.shape), draw(6, *k.shape))
    expected = torch.autograd.grad(turned, leaves, [part.double() for part in along])
    found = TORCH.rope(*(part.double() for part in along), cos, sin, backward=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("vocabulary", [5, 4096, 10_001])
def test_a_loss_and_its_gradient_are_torchs(vocabulary: int, smoothing: float) -> None:
    scores = 5 * draw(0, 4, vocabulary)
    scores[1, 2:] = float("-inf") if not smoothing else -80.0  # one block has nothing else
    targets = torch.tensor([0, 1, vocabulary - 1, vocabulary // 2])
    found = TritonBackend().cross_entropy(scores, targets, smoothing)
    leaf = scores.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        leaf, targets, reduction="none", label_smoothing=smoothing
    )
    assert_same(found, [expected.detach(), torch.autograd.grad(expected.sum(), leaf)[0]])


@pytest.mark.usefixtures("interpreter")
def test_a_target_that_is_not_there_is_no_number() -> None:
    for target in (-100, 8):
        losses, _ = TritonBackend().cross_entropy(draw(0, 1, 8), torch.tensor([target]), 0.0)
        assert losses.isnan().all()


class Always(kernels.Kernels):
    """Has one way to compute them all, and counts what it is asked for."""

    formulas: TorchBackend = TORCH

    def norm(self, *_: Any) -> TorchBackend:
        """Return it."""
        return self.formulas

    glu = rope = cross_entropy = norm


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_a_model_learns_the_same_by_the_kernels(family: str) -> None:
    def gradients(formulas: TorchBackend) -> list[torch.Tensor]:
        chosen = type("Chosen", (Always,), {"formulas": formulas})()
        torch.manual_seed(0)
        model = build(family).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name)
        parts = [FusedNormGlu(model, chosen), FusedRope(model, chosen)]
        assert all(part.count for part in parts)
        head = ChunkedCrossEntropy(model, chosen)
        ids = torch.arange(12)[None] + 5
        at, targets = torch.arange(11), ids[0, 1:]
        loss = head.loss_sum(lambda: model(input_ids=ids, use_cache=False), at, targets)
        loss.backward()
        for part in (*parts, head):
            part.remove()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    assert_same(
        gradients(TritonBackend()), gradients(TORCH), rounding=2e-6
    )  # sums of a whole model: 5e-7 on AMD, 9e-7 on Intel


def test_rotary_embeddings_are_put_back_and_are_the_models_own_where_none_serves() -> None:
    from transformers.models.llama import modeling_llama

    model, plain = build("llama").eval(), modeling_llama.apply_rotary_pos_emb
    ids = torch.arange(12)[None] + 5
    expected = model(ids).logits
    fused = FusedRope(model, kernels.Kernels())
    assert fused.count == 1
    assert modeling_llama.apply_rotary_pos_emb is not plain
    assert torch.equal(model(ids).logits, expected)
    again = FusedRope(model, kernels.Kernels())
    assert again.count == 0, "another step's stays"
    again.remove()
    fused.remove()
    assert modeling_llama.apply_rotary_pos_emb is plain


def test_another_rotation_is_left_alone() -> None:
    from transformers.models.cohere import modeling_cohere

    assert not rope.is_rope(modeling_cohere.apply_rotary_pos_emb)  # pairs, not halves
    assert FusedRope(build("gpt2"), kernels.Kernels()).count == 0


def test_shapes_are_known_without_numbers() -> None:
    x, weight = torch.empty(2, 3, 8, device="meta", dtype=torch.bfloat16), torch.empty(8)
    y, scale = TritonBackend().norm(x, weight.to("meta"), 1e-5)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert (scale.shape, scale.dtype) == ((2, 3, 1), torch.float32)
    of_gate, of_up = TritonBackend().glu_backward("silu", x, x, x)
    assert of_gate.shape == of_up.shape == x.shape
    q, k, angles = x[:, :, None], x[:, :, None], x[:1]
    assert [part.shape for part in TritonBackend().rope(q, k, angles, angles)] == [q.shape] * 2
    scores, targets = x[0], torch.empty(3, device="meta", dtype=torch.long)
    losses, gradient = TritonBackend().cross_entropy(scores, targets, 0.0)
    assert (losses.shape, losses.dtype) == ((3,), torch.float32)
    assert (gradient.shape, gradient.dtype) == (scores.shape, scores.dtype)


def test_a_cpu_and_a_machine_without_triton_compute_as_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert kernels.Kernels().norm(64, torch.float32, torch.float32, "cpu") is TORCH
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda _: None)
    assert not kernels.supports_triton("cuda", torch.bfloat16)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda _: True)
    assert kernels.supports_triton("cuda", torch.bfloat16)
    assert not kernels.supports_triton("cuda", torch.float64)
    assert kernels.NO_KERNELS.glu("silu", 64, torch.bfloat16, "cuda") is TORCH


class Like(TorchBackend):
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
    monkeypatch.setattr(kernels, "TritonBackend", mine)
    monkeypatch.setattr(kernels, "supports_triton", lambda *_: True)
    monkeypatch.setattr(kernels, "TOKENS", 8)
    monkeypatch.setattr(kernels, "_selected", {})
    monkeypatch.setattr(
        kernels, "time", lambda _, formulas, __: seconds[not isinstance(formulas, mine)]
    )
    chosen = kernels.select_glu.__wrapped__("silu", 96, torch.bfloat16, "cpu")
    assert isinstance(chosen, mine) == is_used
    assert is_used or chosen is TORCH
    said = kernels.get_used_kernels()
    assert said == {"silu GLU 96 wide in torch.bfloat16": is_used}
