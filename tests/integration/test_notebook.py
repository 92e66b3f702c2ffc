"""examples/quickstart.ipynb runs cell by cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest

from run_notebook import NOTEBOOK, run


def told_by(notebook: Any) -> list[str]:
    """Return what each cell of code shows."""
    return [
        "".join(str(output.get("text", output.get("data", ""))) for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def check(told: list[str]) -> None:
    assert "topic" in told[0]
    assert "--map label=topic" in told[1], "the dry run says what is missing"
    assert "'accuracy'" in told[3]
    assert "prediction" in told[4]
    assert "report.html" in told[5]


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    check(told_by(run(tmp_path)))
    assert (tmp_path / "my-model/config.json").is_file()


def test_it_shows_what_a_run_gave() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    check(told_by(notebook))
    assert "/tmp/" not in NOTEBOOK.read_text(encoding="utf-8")
