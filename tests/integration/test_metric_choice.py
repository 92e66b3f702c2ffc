"""`--metrics` selects the reported metrics, in training and evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import Cli
from run_files import ModelDir

ROWS = [{"text": f"say {i} more", "label": "odd" if i % 2 else "even"} for i in range(12)]


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: ModelDir) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny_model_dir("bert"))
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def test_only_selected_metrics_are_reported(cli: Cli) -> None:
    args = ["train", "--model", "./model", "--dataset", "rows.jsonl", "--validation-split", "0.4",
            "--max-steps", "1", "--output-dir", "run", "-q", "--metrics", "f1,mcc"]  # fmt: skip
    cli(*args)
    assert json.loads(Path("run/summary.json").read_text())["metrics"].keys() == {
        "loss", "f1", "mcc",
    }  # fmt: skip
    for options, names in (
        ([], {"loss", "f1", "mcc"}),
        (["--metrics", "accuracy"], {"loss", "accuracy"}),
    ):
        result = cli.json("evaluate run --json --resamples 5", *options)
        assert result["metrics"].keys() == names
        assert result["intervals"].keys() == names


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model ./model --dataset rows.jsonl --metrics accurac",
         "no metric of --task text-classification is called 'accurac'. Did you mean "
         "'accuracy'? Metrics here: loss, accuracy, f1, mcc."),
        ("--metrics rougeL", "--metrics rougeL needs generated text. Add --predict-with-generate"),
    ],
)  # fmt: skip
def test_unavailable_metric_is_rejected(line: str, message: str, cli: Cli) -> None:
    assert message in " ".join(cli.fails("train --dry-run", *line.split()).split())
