"""The buffer gives every item once, and goes on from its state as it would have gone on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ftlevel.data.prepare.row_stream import ShuffleBuffer


def drain(buffer: ShuffleBuffer[int], items: list[int]) -> list[int]:
    pushed = [buffer.push(item) for item in items]
    given_back = [item for item in pushed if item is not None]
    return given_back + [buffer.pop() for _ in range(len(buffer.items))]


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 5))
def test_every_item_once(count: int, size: int, seed: int) -> None:
    items = list(range(count))
    out = drain(ShuffleBuffer(size, str(seed)), items)
    assert sorted(out) == items
    assert all(position > item - size for position, item in enumerate(out)), "never much earlier"
    assert out == drain(ShuffleBuffer(size, str(seed)), items)
    if size == 1:
        assert out == items


def test_seeds_differ_and_the_order_is_not_the_files() -> None:
    items = list(range(200))
    first, second = (drain(ShuffleBuffer(50, seed), items) for seed in ("a", "b"))
    assert first != second
    assert first != items


@given(st.integers(1, 10), st.integers(0, 40))
def test_a_state_is_a_place_to_go_on_from(size: int, at: int) -> None:
    whole, begun = ShuffleBuffer[int](size, "s"), ShuffleBuffer[int](size, "s")
    items = list(range(40))
    for item in items[:at]:
        assert whole.push(item) == begun.push(item)
    resumed = ShuffleBuffer[int](size, "another")
    resumed.items.extend(begun.items)
    resumed.set_draws(begun.draws())
    assert drain(resumed, items[at:]) == drain(whole, items[at:])
