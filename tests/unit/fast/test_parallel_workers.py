"""Micro-batches in parallel give the gradients of one after another, and the same each time."""

from __future__ import annotations

import threading

import pytest
import torch

from ftlevel.fast.packing import PackedLayout, current_layout, using_layout
from ftlevel.fast.parallel_workers import ParallelWorkers, duration, makespan


@pytest.fixture
def workers():
    made = ParallelWorkers(2, torch.get_num_threads())
    yield made
    made.close()


def layout_of(rows: int) -> PackedLayout:
    return PackedLayout.from_mask(torch.ones(rows, 3, dtype=torch.long))


def test_gradients_are_added_in_the_order_of_the_micro_batches(workers: ParallelWorkers) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    unused = torch.nn.Parameter(torch.ones(3))
    started = threading.Event()

    def compute(number: float) -> torch.Tensor:
        if number == 1.0:  # the first micro-batch is done last
            assert started.wait(10)
        started.set()
        return (weight * number).sum()

    numbers = [1.0, 1e8, -1e8, 3.0]  # in float32 their sum depends on the order
    losses = workers.backward(compute, [(None, n) for n in numbers], [weight, unused])
    expected = torch.zeros(())
    for number in numbers:
        expected += number
    assert [loss.item() for loss in losses] == [3 * n for n in numbers]
    assert weight.grad is not None
    assert torch.equal(weight.grad, expected.expand(3))
    assert unused.grad is None


def test_a_gradient_that_is_there_is_added_to(workers: ParallelWorkers) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), 5.0)
    workers.backward(lambda n: (weight * n).sum(), [(None, 2.0)], [weight])
    assert weight.grad.tolist() == [7.0, 7.0]


def test_every_micro_batch_sees_its_own_layout_in_the_backward_pass_too(
    workers: ParallelWorkers,
) -> None:
    weight = torch.nn.Parameter(torch.ones(()))
    both = threading.Barrier(2, timeout=10)
    seen: dict[int, list[int]] = {1: [], 2: []}

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, number):
            ctx.number = number
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            both.wait()
            seen[ctx.number].append(current_layout().batch)
            return gradient, None

    def compute(number: int) -> torch.Tensor:
        both.wait()
        seen[number].append(current_layout().batch)
        return Look.apply(weight, number)

    with using_layout(layout_of(9)):
        workers.backward(compute, [(layout_of(1), 1), (layout_of(2), 2)], [weight])
        assert current_layout().batch == 9
    assert seen == {1: [1, 1], 2: [2, 2]}
    assert current_layout() is None


def test_what_a_micro_batch_raises_is_raised(workers: ParallelWorkers) -> None:
    weight = torch.nn.Parameter(torch.ones(()))

    def compute(number: int) -> torch.Tensor:
        if number == 2:
            raise MemoryError("too large")
        return weight * number

    with pytest.raises(MemoryError, match="too large"):
        workers.backward(compute, [(None, n) for n in range(5)], [weight])


def test_threads_are_shared_out_and_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        workers, found = ParallelWorkers(2, 4), []
        weight = torch.nn.Parameter(torch.ones(()))

        def compute(_: int) -> torch.Tensor:
            found.append(torch.get_num_threads())
            return weight * 1

        workers.backward(compute, [(None, 1), (None, 2)], [weight])
        assert torch.get_num_threads() == 4
        workers.close()
        assert set(found) == {2}
        new: list[int] = []
        thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert new == [4]
    finally:
        torch.set_num_threads(before)


def test_a_free_worker_takes_the_next_micro_batch() -> None:
    assert makespan([10, 4, 4, 4], 2) == 12
    assert makespan([10], 2) == 10


@pytest.mark.parametrize(
    ("costs", "alone", "pays"),
    [([50, 50], [100], True), ([54, 46], [100], True), ([56, 44], [100], False),
     ([90, 90], [100], False), ([40, 40, 40], [120], False),
     ([40] * 4, [160], True)],
)  # fmt: skip
def test_an_uneven_step_is_computed_with_all_threads(
    costs: list[int], alone: list[int], pays: bool
) -> None:
    assert (duration(costs, 2) < duration(alone, 1)) is pays
