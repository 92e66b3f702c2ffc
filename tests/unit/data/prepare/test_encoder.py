"""Encoder progress for rows that take long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ftlevel.data.prepare import encoder as module
from ftlevel.data.prepare.encoder import Encoder


@pytest.mark.parametrize(("size", "expected"), [(5, []), (11, [(0, 2), (2, 2)])])
def test_long_row_reports_progress_before_encoding(size, expected, monkeypatch):
    monkeypatch.setattr(module, "_SLOW_CHARACTERS", 10)
    calls: list[Any] = []
    calls_before: list[int] = []
    parts: Any = SimpleNamespace()
    encoder = Encoder(
        parts, "decoder", parts, parts, parts, progress=lambda *call: calls.append(call)
    )

    def encode(examples: Any) -> list[Any]:
        calls_before.append(len(calls))
        return list(examples)

    encoder.collect(encode, [SimpleNamespace(key_text="a"), SimpleNamespace(key_text="a" * size)])
    assert calls == expected
    assert calls_before == [len(expected) // 2]
