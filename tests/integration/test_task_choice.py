"""The task of an encoder is inferred from the columns and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftlevel.cli.app import run

ROWS: dict[str, list[dict[str, Any]]] = {
    "text-classification": [{"text": f"word {n}", "label": "ab"[n % 2]} for n in range(8)],
    "token-classification": [{"tokens": ["a", "b"], "ner_tags": ["O", "B-X"]}] * 8,
    "masked-lm": [{"text": f"word {n}"} for n in range(8)],
}


def dry_run(
    path: Path, model: Path, rows: list[dict[str, Any]], capsys: Any, *more: str
) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    typed = ["train", "--model", str(model), "--dataset", str(path), "--dry-run", "--json"]
    assert run([*typed, *more]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("task", ROWS)
def test_the_task_is_inferred(task: str, tmp_path: Path, tiny_model_dir: Any, capsys: Any) -> None:
    model = tiny_model_dir("bert")
    found = dry_run(tmp_path / "rows.jsonl", model, ROWS[task], capsys)
    assert found["config"]["task"] == task


def test_columns_by_map_and_a_task_that_is_named(
    tmp_path: Path, tiny_model_dir: Any, capsys: Any
) -> None:
    model, path = tiny_model_dir("bert"), tmp_path / "rows.jsonl"
    rows = [{"body": row["text"], "mood": row["label"]} for row in ROWS["text-classification"]]
    mapped = ("--text_column", "body", "--label_column_name", "mood")
    found = dry_run(path, model, rows, capsys, *mapped)
    assert found["config"]["task"] == "text-classification"
    assert found["config"]["data"]["columns"] == {"text": "body", "label": "mood"}
    found = dry_run(path, model, ROWS["text-classification"], capsys, "--task", "masked-lm")
    assert found["config"]["task"] == "masked-lm"


def test_columns_that_speak_for_no_task(tmp_path: Path, tiny_model_dir: Any, capsys: Any) -> None:
    (tmp_path / "rows.tsv").write_text("a word\tx\nanother\ty\n")  # without a header
    typed = ["train", "--model", str(tiny_model_dir("bert")), "--dry-run", "--dataset"]
    assert run([*typed, str(tmp_path / "rows.tsv")]) == 2
    said = capsys.readouterr().err
    assert "is an encoder, and the columns match none of its tasks. --task text-clas" in said
    assert "Columns: 'a word', 'x'" in said
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    assert run([*typed, str(tmp_path / "pairs.jsonl")]) == 2
    assert "--task text-generation cannot be used with bert" in capsys.readouterr().err
