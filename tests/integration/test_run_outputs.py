"""Outputs of a run: model card, curves, next commands."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import task_data
from ftlevel.cli.app import run
from ftlevel.commands.evaluate import evaluate
from ftlevel.config import EvaluateConfig

TinyModelDir = Callable[..., Path]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def classifier(tiny_model_dir: TinyModelDir, capsys: pytest.CaptureFixture[str]) -> Path:
    """Return a run on three classes, in a directory that a shell would split."""
    pytest.importorskip("tensorboard")
    rows = [{"Message": f"the {word} {i}", "Kind": "xyz"[i % 3]} for i, word in
            enumerate(task_data.WORDS * 3)]  # fmt: skip
    Path("my rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = run(["train", "--model", str(tiny_model_dir("bert")), "--dataset", "my rows.jsonl",
                "--task", "text-classification", "--map", "text=Message", "--map", "label=Kind",
                "--validation-split", "0.25", "--max-steps", "2", "--output-dir", "my run",
                "--report-to", "tensorboard", "--overlong", "drop"])  # fmt: skip
    assert code == 0
    Path("said.txt").write_text(capsys.readouterr().out)
    return Path("my run")


def test_the_card_says_how_peft_alone_has_the_labels(classifier: Path) -> None:
    from peft import AutoPeftModelForSequenceClassification

    text = (classifier / "README.md").read_text()
    assert "3 labels: `x`, `y`, `z`." in text
    assert "text metrics" not in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code.replace('"adapter"', repr(str(classifier / "adapter"))), found)  # as a user would
    assert found["model"].config.id2label == {0: "x", 1: "y", 2: "z"}
    bare = AutoPeftModelForSequenceClassification.from_pretrained(
        classifier / "adapter", num_labels=3
    )
    assert bare.config.id2label[0] == "LABEL_0"  # once PEFT keeps the names, the card need not


def test_curves_lie_in_the_run(classifier: Path) -> None:
    assert [path.parent.name for path in classifier.rglob("events.out.*")] == ["tensorboard"]
    assert not (classifier / "checkpoints/runs").exists()


def test_the_next_commands_work_as_they_are(classifier: Path) -> None:
    said = Path("said.txt").read_text()
    commands = json.loads((classifier / "summary.json").read_text())["next"]
    assert commands == [
        "ftlevel evaluate 'my run'",
        "ftlevel predict 'my run' --dataset 'my rows.jsonl' --limit 5",
        "ftlevel merge 'my run' --out 'my run-merged'",
    ]
    for command in commands:
        assert command in said
        assert run(shlex.split(command)[1:]) == 0
    assert "adapter (adapter and tokenizer)" in said
    assert "checkpoints (for --resume)" in said.rpartition("saved")[2]


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        ({"Message": "the file", "Kind": "x"}, "text from 'Message', label from 'Kind'"),
        ({"text": "the file", "label": "x"}, "text + label: 'text', 'label'"),
        ({"Message": "the file", "label": "x"}, "text from 'Message', 'label'"),
    ],
)
def test_the_trainings_map_is_not_held_against_other_rows(
    rows: dict[str, str], note: str, classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other.jsonl").write_text("\n".join([json.dumps(rows)] * 2))
    capsys.readouterr()
    command = ["evaluate", "my run", "--dataset", "other.jsonl", "--resamples", "0"]
    assert run(command) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "columns:" in line]
    assert len(said) == 1
    assert note in said[0]
    assert ("do not fit these" in said[0]) == ("Kind" not in rows)
    assert run([*command, "--map", "text=Gone"]) == 2  # which was typed


def test_columns_that_fit_nothing_are_told_of_without_the_trainings_map(
    classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other.jsonl").write_text('{"Betreff": "the file", "Art": "x"}')
    assert run(["evaluate", "my run", "--dataset", "other.jsonl"]) == 2
    complaint = capsys.readouterr().err
    assert "the columns do not say what to learn" in complaint
    assert "Message" not in complaint


def test_other_rows_are_not_the_validation_file(tiny_model_dir: TinyModelDir) -> None:
    task_data.write(Path("data"), "class")
    code = run(["train", "--model", str(tiny_model_dir("bert")), "--dataset", "data/train.jsonl",
                "--validation-file", "data/validation.jsonl", "--task", "text-classification",
                "--max-steps", "1", "--output-dir", "run", "--quiet"])  # fmt: skip
    assert code == 0
    found = evaluate(EvaluateConfig(name="run", dataset="data/train.jsonl", resamples=0))
    assert found.summary["data"]["rows"] == 16


@pytest.mark.parametrize(
    ("arguments", "warned"),
    [
        (["--dataset", "rows.jsonl"], True),
        (["--dataset", "rows.jsonl", "--model", "builtin:tiny-llama"], False),
        ([], False),
    ],
)
def test_rows_of_ones_own_need_a_model(
    arguments: list[str], warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.jsonl").write_text('{"prompt": "the file", "completion": "the default"}\n')
    assert run(["train", *arguments, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert ("warning: no --model given" in err) is warned
    assert "no --model given" not in out


def test_a_preview_shows_labels_that_are_made_one(
    tiny_model_dir: TinyModelDir, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"the {w}", "label": "x" if i else " x"} for i, w in
            enumerate(task_data.WORDS)]  # fmt: skip
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"text": "a", "label": "y"}])))
    command = ["preview", "--model", str(tiny_model_dir("bert")), "--dataset", "rows.jsonl"]
    assert run([*command, "--task", "text-classification"]) == 0
    assert ": made one; --set data.gate.label_space=…" in capsys.readouterr().out
