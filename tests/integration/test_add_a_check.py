"""Adding a data check: a configuration field and a function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from additions.tree import CHECK, run

pytestmark = pytest.mark.slow


def test_added_check_reports_and_drops_rows(tmp_path: Path) -> None:
    tree = CHECK.apply(tmp_path / "tree")
    rows = [{"text": f"a sentence of several words, the {i}th of them"} for i in range(9)]
    rows.append({"text": "I"})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    command = ["preview", "--dataset", "rows.jsonl", "--json"]
    preview = json.loads(run(tree, *command, cwd=tmp_path))
    (finding,) = [f for f in preview["findings"] if f["name"] == "short_row"]
    assert (finding["count"], finding["action"]) == (1, "warn")
    assert finding["title"] == "fewer than three tokens"
    command += ["--set", "data.gate.short_row=drop"]
    assert json.loads(run(tree, *command, cwd=tmp_path))["data"]["train_rows"] == 9


def test_adding_a_check_changes_two_files() -> None:
    assert len(CHECK.touched) <= 2
