"""Encoding says that it is at work where a single row takes long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ftlevel.data.prepare import encoder as module
from ftlevel.data.prepare.encoder import Encoder


@pytest.mark.parametrize(("size", "told"), [(5, []), (11, [(0, 2), (2, 2)])])
def test_a_long_row_shows_progress_before_it_is_encoded(
    size: int, told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SLOW_CHARACTERS", 10)
    calls: list[Any] = []
    seen: list[int] = []
    parts: Any = SimpleNamespace()
    encoder = Encoder(
        parts, "decoder", parts, parts, parts, progress=lambda *call: calls.append(call)
    )

    def encode(examples: Any) -> list[Any]:
        seen.append(len(calls))
        return list(examples)

    encoder.collect(encode, [SimpleNamespace(key_text="a"), SimpleNamespace(key_text="a" * size)])
    assert calls == told
    assert seen == [len(told) // 2]
