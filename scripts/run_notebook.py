"""Run examples/quickstart.ipynb and save the outputs of its cells.

What libraries say on stderr while they are imported differs from machine to machine and is dropped.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples/quickstart.ipynb"
_LONGEST = 300  # seconds a cell


def run(place: Path) -> nbformat.NotebookNode:
    """Return the notebook as it is after a run in `place`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(place)}}
    NotebookClient(notebook, timeout=_LONGEST, kernel_name="python3", resources=where).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(run(Path(folder)), NOTEBOOK)
