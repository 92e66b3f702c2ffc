"""Notebook output, with stand-ins for the two IPython functions that are called."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from ftlevel.commands.train import TrainResult
from ftlevel.config.section import Choice
from ftlevel.events import Notebook, default_listener


def test_result_is_one_line():
    metrics = {"accuracy": 0.9125, "loss": 0.25}
    summary = {"run": "runs/one", "metrics": metrics, "config": {"a": ["b"] * 999}}
    result = TrainResult(summary, Path("runs/one"), object(), object())
    assert repr(result) == (
        "TrainResult(runs/one, accuracy 0.9125, loss 0.25, summary of 3 entries)"
    )


class Cell:
    """The output of a cell."""

    def __init__(self) -> None:
        self.outputs: list[str] = []

    def display(self, content: str, *, display_id: bool) -> Cell:
        self.outputs.append(content)
        return self

    def update(self, content: str) -> None:
        self.outputs.append(content)


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    """Return the output of the notebook cell in which the test runs."""
    result = Cell()
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = object  # type: ignore[attr-defined]
    display = types.ModuleType("IPython.display")
    display.HTML = str  # type: ignore[attr-defined]
    display.display = result.display  # type: ignore[attr-defined]
    for name, module in (("IPython", ipython), ("IPython.display", display)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    return result


def test_run_updates_one_output(cell):
    listener = default_listener()
    assert isinstance(listener, Notebook)
    listener.stage("read <the> data")
    listener.choices("train", [Choice("model", "x<y", "because & so")])
    listener.warn("2 < 3")
    listener.begin(2)
    listener.log({"step": 1, "loss": 1.25, "learning_rate": 1e-4, "reward": 0.375})
    listener.step(1)
    listener.log({"step": 1, "eval_loss": 0.5, "eval_accuracy": 0.75})
    listener.step(2)
    assert "<progress value='2' max='2'>" in cell.outputs[-1]
    listener.end({"run": "runs/my run"})
    last = cell.outputs[-1]
    for part in ("x&lt;y", "because &amp; so", "2 &lt; 3", "1.2500", "1.00e-04", "0.375", "0.7500",
                 "runs/my run"):  # fmt: skip
        assert part in last
    assert "<the>" not in "".join(cell.outputs)
    assert "progress" not in last


def test_updates_are_throttled(cell):
    listener = default_listener()
    listener.begin(1_000)
    for step in range(1_000):
        listener.step(step)
    assert len(cell.outputs) < 100


def test_outside_notebooks_only_warnings_are_logged(monkeypatch, caplog, capfd):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    listener = default_listener()
    listener.stage("train")
    listener.log({"step": 1, "loss": 1.0})
    listener.warn("the loss did not fall")
    assert capfd.readouterr().out == ""
    assert [(record.name, record.message) for record in caplog.records] == [
        ("ftlevel", "the loss did not fall")
    ]
