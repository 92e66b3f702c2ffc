"""The task of an encoder is inferred from the columns and shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from command_line import Cli
from run_files import write_rows

ROWS: dict[str, list[dict[str, Any]]] = {
    "text-classification": [{"text": f"word {n}", "label": "ab"[n % 2]} for n in range(8)],
    "token-classification": [{"tokens": ["a", "b"], "ner_tags": ["O", "B-X"]}] * 8,
    "masked-lm": [{"text": f"word {n}"} for n in range(8)],
}


def dry_run(
    path: Path, model: Path, rows: list[dict[str, Any]], cli: Cli, *options: str
) -> dict[str, Any]:
    command = f"train --model {model} --dataset {write_rows(path, rows)} --dry-run --json"
    return dict(cli.json(command, *options))


@pytest.mark.parametrize("task", ROWS)
def test_task_is_inferred_from_columns(
    task: str, tmp_path: Path, tiny_model_dir: Any, cli: Cli
) -> None:
    model = tiny_model_dir("bert")
    plan = dry_run(tmp_path / "rows.jsonl", model, ROWS[task], cli)
    assert plan["config"]["task"] == task


def test_mapped_columns_or_task_option_determine_task(
    tmp_path: Path, tiny_model_dir: Any, cli: Cli
) -> None:
    model, path = tiny_model_dir("bert"), tmp_path / "rows.jsonl"
    rows = [{"body": row["text"], "mood": row["label"]} for row in ROWS["text-classification"]]
    mapping = ("--text_column", "body", "--label_column_name", "mood")
    plan = dry_run(path, model, rows, cli, *mapping)
    assert plan["config"]["task"] == "text-classification"
    assert plan["config"]["data"]["columns"] == {"text": "body", "label": "mood"}
    plan = dry_run(path, model, ROWS["text-classification"], cli, "--task", "masked-lm")
    assert plan["config"]["task"] == "masked-lm"


def test_unknown_columns_are_rejected(tmp_path: Path, tiny_model_dir: Any, cli: Cli) -> None:
    (tmp_path / "rows.tsv").write_text("a word\tx\nanother\ty\n")  # without a header
    command = ["train", "--model", str(tiny_model_dir("bert")), "--dry-run", "--dataset"]
    message = cli.fails(*command, tmp_path / "rows.tsv")
    assert "is an encoder, and the columns match none of its tasks. --task text-clas" in message
    assert "Columns: 'a word', 'x'" in message
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    error = cli.fails(*command, tmp_path / "pairs.jsonl")
    assert "--task text-generation cannot be used with bert" in error
