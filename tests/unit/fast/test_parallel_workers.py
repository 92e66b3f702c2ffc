"""Tests that parallel micro-batches give the gradients of sequential ones, reproducibly."""

from __future__ import annotations

import threading

import pytest
import torch

from ftlevel.fast.packing import PackedLayout, current_layout, using_layout
from ftlevel.fast.parallel_workers import ParallelWorkers, duration, makespan


@pytest.fixture
def workers():
    parallel_workers = ParallelWorkers(2, torch.get_num_threads())
    yield parallel_workers
    parallel_workers.close()


def layout_of(rows: int) -> PackedLayout:
    return PackedLayout.from_mask(torch.ones(rows, 3, dtype=torch.long))


def test_gradients_are_accumulated_in_micro_batch_order(workers):
    weight = torch.nn.Parameter(torch.ones(3))
    unused = torch.nn.Parameter(torch.ones(3))
    started = threading.Event()

    def compute(factor: float) -> torch.Tensor:
        if factor == 1.0:  # the first micro-batch finishes last
            assert started.wait(10)
        started.set()
        return (weight * factor).sum()

    factors = [1.0, 1e8, -1e8, 3.0]  # in float32 their sum depends on the order
    losses = workers.backward(compute, [(None, n) for n in factors], [weight, unused])
    expected = torch.zeros(())
    for factor in factors:
        expected += factor
    assert [loss.item() for loss in losses] == [3 * n for n in factors]
    assert weight.grad is not None
    assert torch.equal(weight.grad, expected.expand(3))
    assert unused.grad is None


def test_backward_accumulates_into_existing_gradient(workers):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), 5.0)
    workers.backward(lambda n: (weight * n).sum(), [(None, 2.0)], [weight])
    assert weight.grad.tolist() == [7.0, 7.0]


def test_each_micro_batch_uses_own_layout_in_backward(workers):
    weight = torch.nn.Parameter(torch.ones(()))
    barrier = threading.Barrier(2, timeout=10)
    batch_sizes: dict[int, list[int]] = {1: [], 2: []}

    class RecordLayout(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, number):
            ctx.number = number
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            barrier.wait()
            batch_sizes[ctx.number].append(current_layout().batch)
            return gradient, None

    def compute(number: int) -> torch.Tensor:
        barrier.wait()
        batch_sizes[number].append(current_layout().batch)
        return RecordLayout.apply(weight, number)

    with using_layout(layout_of(9)):
        workers.backward(compute, [(layout_of(1), 1), (layout_of(2), 2)], [weight])
        assert current_layout().batch == 9
    assert batch_sizes == {1: [1, 1], 2: [2, 2]}
    assert current_layout() is None


def test_exception_in_micro_batch_is_propagated(workers):
    weight = torch.nn.Parameter(torch.ones(()))

    def compute(number: int) -> torch.Tensor:
        if number == 2:
            raise MemoryError("too large")
        return weight * number

    with pytest.raises(MemoryError, match="too large"):
        workers.backward(compute, [(None, n) for n in range(5)], [weight])


def test_threads_are_split_among_workers_and_restored():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        workers, thread_counts = ParallelWorkers(2, 4), []
        weight = torch.nn.Parameter(torch.ones(()))

        def compute(_: int) -> torch.Tensor:
            thread_counts.append(torch.get_num_threads())
            return weight * 1

        workers.backward(compute, [(None, 1), (None, 2)], [weight])
        assert torch.get_num_threads() == 4
        workers.close()
        assert set(thread_counts) == {2}
        new_thread_counts: list[int] = []
        thread = threading.Thread(target=lambda: new_thread_counts.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert new_thread_counts == [4]
    finally:
        torch.set_num_threads(before)


def test_makespan_assigns_next_micro_batch_to_free_worker():
    assert makespan([10, 4, 4, 4], 2) == 12
    assert makespan([10], 2) == 10


@pytest.mark.parametrize(
    ("costs", "sequential_costs", "is_parallel_faster"),
    [([50, 50], [100], True), ([54, 46], [100], True), ([56, 44], [100], False),
     ([90, 90], [100], False), ([40, 40, 40], [120], False),
     ([40] * 4, [160], True)],
)  # fmt: skip
def test_unbalanced_step_is_not_run_in_parallel(costs, sequential_costs, is_parallel_faster):
    assert (duration(costs, 2) < duration(sequential_costs, 1)) is is_parallel_faster
