"""A sequence whose items are made when they are asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class Computed(Sequence[T]):
    """A sequence by its length and `_item`; several items are a list."""

    @abstractmethod
    def _item(self, at: int) -> T:
        """Return the item at `at`, from 0."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        """Return an item, or several as a list."""
        chosen = range(len(self))[index]
        return self._item(chosen) if isinstance(chosen, int) else [self._item(i) for i in chosen]
