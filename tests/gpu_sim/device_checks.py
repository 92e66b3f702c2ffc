"""What the simulated device must notice and compute; run on the device by test_simulated_gpu.py."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from gpu_sim import device


def count_waits(operation: Callable[[], Any]) -> int:
    """Return how often the host waits for `operation`."""
    assert device.installed is not None
    before = device.installed.all_waits
    operation()
    return device.installed.all_waits - before


def check_devices() -> None:
    """Tensors on two devices raise torch's error, a scalar on the host does not."""
    on_card, on_host = torch.ones(2, device="cuda"), torch.ones(2)
    with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"):
        on_card + on_host
    assert (on_card + torch.tensor(1.0)).tolist() == [2.0, 2.0]


def check_waits() -> None:
    """Reading values, masks and blocking copies wait; pinned copies and arithmetic do not."""
    on_card, on_host = torch.ones(8, device="cuda"), torch.ones(8)
    pinned = on_host.pin_memory()
    for operation in (
        lambda: float(on_card.sum()), lambda: on_host.to("cuda"), lambda: on_card.cpu(),
        lambda: on_card.nonzero(), lambda: on_card[on_card > 0], lambda: pinned.to("cuda"),
        lambda: on_host.to("cuda", non_blocking=True), lambda: torch.tensor(1, device="cuda"),
    ):  # fmt: skip
        assert count_waits(operation) >= 1
    for operation in (
        lambda: on_card * 2, lambda: pinned.to("cuda", non_blocking=True),
        lambda: on_card.new_full((), 3), lambda: on_card[torch.arange(2, device="cuda")],
    ):  # fmt: skip
        assert count_waits(operation) == 0


def check_waits_of_backward() -> None:
    """Waits in a thread of the backward pass count, which has no Python frames of its own."""

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gradient * float(gradient.sum())

    x = torch.ones(2, device="cuda", requires_grad=True)
    assert count_waits(lambda: Reads.apply(x).sum().backward()) >= 1  # type: ignore[no-untyped-call]


def check_waits_hold_nothing() -> None:
    """A wait does not keep the tensors of its callers."""

    def read() -> weakref.ref[torch.Tensor]:
        x = torch.ones(2, device="cuda")
        float(x.sum())
        return weakref.ref(x)

    gc.disable()
    assert read()() is None
    gc.enable()


def check_memory() -> None:
    """Freed memory stays in the cache; more than the device has raises torch's error."""
    allocated = torch.cuda.memory_allocated()
    temporary = torch.empty(1 << 20, device="cuda")
    assert torch.cuda.memory_allocated() == allocated + (1 << 22)
    del temporary
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.max_memory_allocated() >= allocated + (1 << 22)
    assert torch.cuda.memory_reserved() >= allocated + (1 << 22)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == allocated
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(torch.cuda.mem_get_info()[1], device="cuda")


def check_decomposed_operations() -> None:
    """Operations that have a kernel on a card allocate nothing but their results."""
    x, gradient = torch.ones(2, 1 << 16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = torch.ops.aten.silu_backward(gradient, x)
    assert torch.cuda.max_memory_allocated() == before + result.nbytes


def check_views() -> None:
    """Views share memory with their base, and out= tensors are resized."""
    base = torch.zeros(2, 3, device="cuda")
    base[1].add_(1)
    assert base.tolist() == [[0, 0, 0], [1, 1, 1]]
    out = torch.empty(0, device="cuda")
    torch.add(base, base, out=out)
    assert out.shape == base.shape
    assert out.device == base.device


def check_streams() -> None:
    """Streams of torch.accelerator accept the device's events, as FSDP2 needs after a backward."""
    event = torch.cuda.current_stream().record_event()
    torch.accelerator.current_stream().wait_event(event)
    assert not torch.accelerator.current_stream().is_capturing()
    assert count_waits(torch.accelerator.synchronize) == 1


def check_attention() -> None:
    """Flash attention and its gradients are those of float64."""
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(10, heads, 16, generator=draw).bfloat16() for heads in (4, 2, 2)]
    on_card = [part.cuda().requires_grad_() for part in states]
    exact = [part.double().requires_grad_() for part in states]
    ends = torch.tensor([0, 4, 10], dtype=torch.int32, device="cuda")
    packed = varlen_attn(*on_card, ends, ends, 6, 6, window_size=(-1, 0), enable_gqa=True)
    parts = [
        functional.scaled_dot_product_attention(
            *(part[start:stop].transpose(0, 1)[None] for part in exact), is_causal=True,
            enable_gqa=True,
        )[0].transpose(0, 1)
        for start, stop in ((0, 4), (4, 10))
    ]  # fmt: skip
    expected = torch.cat(parts)
    packed.double().square().sum().backward()
    expected.square().sum().backward()
    pairs = [(packed.detach(), expected.detach())]
    pairs += [(one.grad, other.grad) for one, other in zip(on_card, exact, strict=True)]
    for actual, reference in pairs:
        assert (actual.cpu() - reference).norm() <= 1e-2 * reference.norm()


def check_padded_attention() -> None:
    """SDPA uses a fused kernel, with and without a mask: it stores no attention weights."""
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 4, 130, 16, generator=draw) for _ in range(3)]
    mask = torch.ones(2, 1, 130, 130, dtype=torch.bool).tril()
    for dtype, masks in ((torch.float32, (mask, mask.cuda())), (torch.bfloat16, (None, None))):
        on_card = [part.to("cuda", dtype).requires_grad_() for part in states]
        exact = [part.to(dtype).double().requires_grad_() for part in states]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = [
            functional.scaled_dot_product_attention(
                *parts, attn_mask=hides, is_causal=hides is None
            )
            for parts, hides in zip((exact, on_card), masks, strict=True)
        ]
        weights = mask.numel() * 4 * dtype.itemsize
        assert torch.cuda.max_memory_allocated() - before < weights
        for output in outputs:
            output.double().square().sum().backward()
        for one, other in zip(on_card, exact, strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert (one.grad.cpu() - other.grad).norm() <= 1e-2 * other.grad.norm()


if __name__ == "__main__":
    for check in (
        check_devices, check_waits, check_waits_of_backward, check_waits_hold_nothing,
        check_memory, check_views, check_decomposed_operations, check_streams, check_attention,
        check_padded_attention,
    ):  # fmt: skip
        check()
