"""Adapters in the formats of other libraries, read by the `adapter_readers` of extensions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.extensions import loaded


class ForeignAdapter(Protocol):
    """An adapter in another library's format, before its weights are loaded."""

    @property
    def base(self) -> str:
        """Name of the base model."""

    @property
    def heads(self) -> Sequence[str]:
        """Modules that are saved with the adapter in full."""

    def task(self, wanted: str | None) -> str:
        """Return its task, `wanted` if it has none; raise InputError if they differ."""

    def complete(self, card: AdapterCard) -> AdapterCard:
        """Return the card of its base with the adapter's labels and options."""

    def convert(self, model: Any) -> tuple[Any, dict[str, Any]]:
        """Return its PEFT config, and its weights by PEFT's names; does not change `model`.

        Raises InputError if it is damaged, of another base, or of an unsupported kind.
        """


class AdapterReader(Protocol):
    """Reader of a format.

    Attributes:
        kind: name of the format, as in `Extension.adapter_readers`.
        name: name of the format in messages.
        library: library that writes it, in messages.
        peft_type: type of all its adapters in PEFT.
    """

    kind: str
    name: str
    library: str
    peft_type: str

    def recognizes(self, directory: Path) -> bool:
        """Return whether the adapter in `directory` has this format."""

    def read(self, directory: Path) -> ForeignAdapter:
        """Read an adapter; raise InputError if it is invalid or names no base."""


@functools.cache
def _readers() -> list[AdapterReader]:
    return list(loaded("adapter_readers").values())


def find_reader(directory: Path) -> AdapterReader | None:
    """Find the reader of the adapter in `directory`; None for PEFT's format."""
    return next((reader for reader in _readers() if reader.recognizes(directory)), None)
