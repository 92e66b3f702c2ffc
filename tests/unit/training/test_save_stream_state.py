"""Where a stream is stands in a checkpoint once, though every process knows it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftlevel.training.saving import SaveStreamState


@pytest.mark.parametrize("is_first", [True, False])
def test_the_first_process_writes_it_for_all(tmp_path: Path, is_first: bool) -> None:
    """Two that write one file at once take it from one another."""
    saved: list[tuple[Path, int]] = []
    rows: Any = SimpleNamespace(save=lambda *given: saved.append(given))
    state: Any = SimpleNamespace(global_step=4, is_world_process_zero=is_first)
    given: Any = (None, state, None)
    SaveStreamState(rows, tmp_path).on_save(*given)
    assert saved == ([(tmp_path / "checkpoint-4", 4)] if is_first else [])
