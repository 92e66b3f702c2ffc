"""Outputs of a run: model card, curves, next commands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import task_data
from command_line import Cli
from ftlevel.cli.app import run
from ftlevel.commands.evaluate import evaluate
from ftlevel.config import EvaluateConfig
from run_files import ModelDir, read_summary, write_rows

pytestmark = pytest.mark.usefixtures("work_dir")


@pytest.fixture
def classifier_run(tiny_model_dir: ModelDir, capsys: pytest.CaptureFixture[str]) -> Path:
    """Return a run on three classes, in a directory with a space in its name."""
    pytest.importorskip("tensorboard")
    rows = [{"Message": f"the {word} {i}", "Kind": "xyz"[i % 3]} for i, word in
            enumerate(task_data.WORDS * 3)]  # fmt: skip
    write_rows("my rows.jsonl", rows)
    code = run(["train", "--model", str(tiny_model_dir("bert")), "--dataset", "my rows.jsonl",
                "--task", "text-classification", "--map", "text=Message", "--map", "label=Kind",
                "--validation-split", "0.25", "--max-steps", "2", "--output-dir", "my run",
                "--report-to", "tensorboard", "--overlong", "drop"])  # fmt: skip
    assert code == 0
    Path("said.txt").write_text(capsys.readouterr().out)
    return Path("my run")


def test_card_code_loads_labels_with_peft(classifier_run: Path) -> None:
    from peft import AutoPeftModelForSequenceClassification

    text = (classifier_run / "README.md").read_text()
    assert "3 labels: `x`, `y`, `z`." in text
    assert "text metrics" not in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(code.replace('"adapter"', repr(str(classifier_run / "adapter"))), namespace)  # like a user
    assert namespace["model"].config.id2label == {0: "x", 1: "y", 2: "z"}
    without_labels = AutoPeftModelForSequenceClassification.from_pretrained(
        classifier_run / "adapter", num_labels=3
    )
    assert without_labels.config.id2label[0] == "LABEL_0"  # PEFT does not store label names


def test_tensorboard_files_are_in_run_directory(classifier_run: Path) -> None:
    assert [path.parent.name for path in classifier_run.rglob("events.out.*")] == ["tensorboard"]
    assert not (classifier_run / "checkpoints/runs").exists()


def test_next_commands_run_as_printed(classifier_run: Path) -> None:
    output = Path("said.txt").read_text()
    commands = read_summary(classifier_run)["next"]
    assert commands == [
        "ftlevel evaluate 'my run'",
        "ftlevel predict 'my run' --dataset 'my rows.jsonl' --limit 5",
        "ftlevel merge 'my run' --out 'my run-merged'",
    ]
    for command in commands:
        assert command in output
        assert run(shlex.split(command)[1:]) == 0
    assert "adapter (adapter and tokenizer)" in output
    assert "checkpoints (for --resume)" in output.rpartition("saved")[2]


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        ({"Message": "the file", "Kind": "x"}, "text from 'Message', label from 'Kind'"),
        ({"text": "the file", "label": "x"}, "text + label: 'text', 'label'"),
        ({"Message": "the file", "label": "x"}, "text from 'Message', 'label'"),
    ],
)
def test_training_column_mapping_is_dropped_if_rows_do_not_fit(
    rows: dict[str, str], note: str, classifier_run: Path, cli: Cli
) -> None:
    Path("other.jsonl").write_text("\n".join([json.dumps(rows)] * 2))
    command = ["evaluate", "my run", "--dataset", "other.jsonl", "--resamples", "0"]
    lines = [line for line in cli(*command).splitlines() if "columns:" in line]
    assert len(lines) == 1
    assert note in lines[0]
    assert ("do not fit these" in lines[0]) == ("Kind" not in rows)
    cli.fails(*command, "--map text=Gone")  # explicit option


def test_unknown_columns_error_ignores_training_mapping(classifier_run: Path, cli: Cli) -> None:
    Path("other.jsonl").write_text('{"Betreff": "the file", "Art": "x"}')
    message = cli.fails("evaluate 'my run' --dataset other.jsonl")
    assert "no format matches the columns" in message
    assert "Message" not in message


def test_evaluate_skips_bad_rows_as_its_error_advises(classifier_run: Path, cli: Cli) -> None:
    texts = ("the file", "", "the list")
    rows = [json.dumps({"Message": text, "Kind": "x"}) for text in texts]
    Path("other.jsonl").write_text("\n".join(rows))
    command = ["evaluate", "my run", "--dataset", "other.jsonl", "--resamples", "0"]
    assert "or drop bad rows with --on-bad-row skip" in cli.fails(*command)
    output = cli.run(*command, "--on-bad-row skip")
    assert "dropped 1 of 3 rows (line 2: 'Message' is empty)" in output.out + output.err


def test_dataset_option_replaces_validation_file(tiny_model_dir: ModelDir) -> None:
    task_data.write(Path("data"), "class")
    code = run(["train", "--model", str(tiny_model_dir("bert")), "--dataset", "data/train.jsonl",
                "--validation-file", "data/validation.jsonl", "--task", "text-classification",
                "--max-steps", "1", "--output-dir", "run", "--quiet"])  # fmt: skip
    assert code == 0
    own = evaluate(EvaluateConfig(name="run", resamples=0)).summary["data"]
    assert (Path(own["name"]).name, own["rows"]) == ("validation.jsonl", 6)
    lines = Path("run/validation.jsonl").read_text().splitlines()
    places = [json.loads(line)["where"] for line in lines]
    assert places == [f"validation.jsonl:{number}" for number in range(1, 7)]
    evaluation = evaluate(EvaluateConfig(name="run", dataset="data/train.jsonl", resamples=0))
    assert evaluation.summary["data"]["rows"] == 16


@pytest.mark.parametrize(
    ("arguments", "is_warned"),
    [
        (["--dataset", "rows.jsonl"], True),
        (["--dataset", "rows.jsonl", "--model", "builtin:tiny-llama"], False),
        ([], False),
    ],
)
def test_missing_model_option_warns_for_own_dataset(
    arguments: list[str], is_warned: bool, cli: Cli
) -> None:
    Path("rows.jsonl").write_text('{"prompt": "the file", "completion": "the default"}\n')
    out, err = cli.run("train", *arguments, "--dry-run")
    assert ("warning: no --model given" in err) is is_warned
    assert "no --model given" not in out


def test_preview_reports_merged_labels(tiny_model_dir: ModelDir, cli: Cli) -> None:
    rows = [{"text": f"the {w}", "label": "x" if i else " x"} for i, w in
            enumerate(task_data.WORDS)]  # fmt: skip
    write_rows("rows.jsonl", [*rows, {"text": "a", "label": "y"}])
    command = ["preview", "--model", str(tiny_model_dir("bert")), "--dataset", "rows.jsonl"]
    output = cli(*command, "--task text-classification")
    assert ": made one; --set data.gate.label_space=stop|warn|ignore" in output
