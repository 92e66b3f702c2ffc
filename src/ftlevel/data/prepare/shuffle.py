"""A shuffle of a stream by a buffer: decided by what goes in, the buffer's size and the seed.

The next row goes into the place of one that is drawn from the full buffer, so that a row comes out
at most as much earlier as the buffer is long, and later by a geometric law with that mean.
"""

from __future__ import annotations

import random
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ShuffleBuffer(Generic[T]):
    """A buffer of `size` items; 1 leaves the order as it is.

    Attributes:
        items: what it holds.
    """

    def __init__(self, size: int, seed: str) -> None:
        self.items: list[T] = []
        self._size = size
        self._random = random.Random(seed)

    def push(self, item: T) -> T | None:
        """Take an item; return the one that gives place to it, None where there is room."""
        if self._size == 1:
            return item
        if len(self.items) < self._size:
            self.items.append(item)
            return None
        at = self._random.randrange(self._size)
        out, self.items[at] = self.items[at], item
        return out

    def pop(self) -> T:
        """Draw an item, when no other comes.

        Raises:
            IndexError: there is none.
        """
        if not self.items:
            raise IndexError("the buffer is empty")
        at = self._random.randrange(len(self.items))
        self.items[at], self.items[-1] = self.items[-1], self.items[at]
        return self.items.pop()

    def draws(self) -> Any:
        """Return the state of the draws, as plain values."""
        return self._random.getstate()

    def set_draws(self, state: Any) -> None:
        """Go on drawing from `state`."""
        version, numbers, gauss = state
        self._random.setstate((version, tuple(numbers), gauss))
