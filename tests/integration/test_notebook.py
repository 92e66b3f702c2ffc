"""examples/quickstart.ipynb runs cell by cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest

from run_notebook import NOTEBOOK, run


def read_outputs(notebook: Any) -> list[str]:
    """Return the output of each code cell."""
    return [
        "".join(str(output.get("text", output.get("data", ""))) for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def assert_expected_outputs(outputs: list[str]) -> None:
    assert "topic" in outputs[0]
    assert "--map label=topic" in outputs[1], "the dry run says what is missing"
    assert "'accuracy'" in outputs[3]
    assert "prediction" in outputs[4]
    assert "report.html" in outputs[5]


@pytest.mark.slow
def test_notebook_runs(tmp_path: Path) -> None:
    assert_expected_outputs(read_outputs(run(tmp_path)))
    assert (tmp_path / "my-model/config.json").is_file()


def test_stored_notebook_has_expected_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert_expected_outputs(read_outputs(notebook))
    assert "/tmp/" not in NOTEBOOK.read_text(encoding="utf-8")
