"""Tests that the position in a data stream is saved once, by the first process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftlevel.training.saving import SaveStreamState


@pytest.mark.parametrize("is_first", [True, False])
def test_only_first_process_saves_stream_state(tmp_path: Path, is_first: bool) -> None:
    """Two processes that write the same file would conflict."""
    saved: list[tuple[Path, int]] = []
    rows: Any = SimpleNamespace(save=lambda *arguments: saved.append(arguments))
    state: Any = SimpleNamespace(global_step=4, is_world_process_zero=is_first)
    callback_args: Any = (None, state, None)
    SaveStreamState(rows, tmp_path).on_save(*callback_args)
    assert saved == ([(tmp_path / "checkpoint-4", 4)] if is_first else [])
