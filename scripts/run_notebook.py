"""Run examples/quickstart.ipynb and save the outputs of its cells.

Output on stderr differs between machines and is dropped.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples/quickstart.ipynb"
_CELL_TIMEOUT = 300  # seconds per cell


def run(directory: Path) -> nbformat.NotebookNode:
    """Return the notebook after a run in `directory`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(directory)}}
    NotebookClient(
        notebook, timeout=_CELL_TIMEOUT, kernel_name="python3", resources=resources
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(run(Path(folder)), NOTEBOOK)
