"""Adding a data check: a configuration field and a function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from additions.tree import CHECK, run

pytestmark = pytest.mark.slow


def test_it_finds_and_its_policy_decides(tmp_path: Path) -> None:
    tree = CHECK.apply(tmp_path / "tree")
    rows = [{"text": f"a sentence of several words, the {i}th of them"} for i in range(9)]
    rows.append({"text": "I"})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    command = ["preview", "--dataset", "rows.jsonl", "--json"]
    told = json.loads(run(tree, *command, cwd=tmp_path))
    (found,) = [f for f in told["findings"] if f["name"] == "short_row"]
    assert (found["count"], found["action"]) == (1, "warn")
    assert found["title"] == "fewer than three tokens"
    command += ["--set", "data.gate.short_row=drop"]
    assert json.loads(run(tree, *command, cwd=tmp_path))["data"]["train_rows"] == 9


def test_it_touches_two_files() -> None:
    assert len(CHECK.touched) <= 2
