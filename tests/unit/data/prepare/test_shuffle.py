"""The shuffle buffer returns every item once and can be resumed from its state."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ftlevel.data.prepare.row_stream import ShuffleBuffer


def drain(buffer: ShuffleBuffer[int], items: list[int]) -> list[int]:
    pushed = [buffer.push(item) for item in items]
    replaced = [item for item in pushed if item is not None]
    return replaced + [buffer.pop() for _ in range(len(buffer.items))]


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 5))
def test_buffer_returns_every_item_once(count: int, size: int, seed: int) -> None:
    items = list(range(count))
    out = drain(ShuffleBuffer(size, str(seed)), items)
    assert sorted(out) == items
    assert all(position > item - size for position, item in enumerate(out)), "never much earlier"
    assert out == drain(ShuffleBuffer(size, str(seed)), items)
    if size == 1:
        assert out == items


def test_order_depends_on_seed_and_differs_from_input() -> None:
    items = list(range(200))
    first, second = (drain(ShuffleBuffer(50, seed), items) for seed in ("a", "b"))
    assert first != second
    assert first != items


@given(st.integers(1, 10), st.integers(0, 40))
def test_buffer_resumes_from_state(size: int, position: int) -> None:
    uninterrupted, interrupted = ShuffleBuffer[int](size, "s"), ShuffleBuffer[int](size, "s")
    items = list(range(40))
    for item in items[:position]:
        assert uninterrupted.push(item) == interrupted.push(item)
    resumed = ShuffleBuffer[int](size, "another")
    resumed.items.extend(interrupted.items)
    resumed.set_draws(interrupted.draws())
    assert drain(resumed, items[position:]) == drain(uninterrupted, items[position:])
