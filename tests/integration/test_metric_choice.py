"""`--metrics` selects the reported metrics, in training and evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlevel.cli.app import run

ROWS = [{"text": f"say {i} more", "label": "odd" if i % 2 else "even"} for i in range(12)]


@pytest.fixture(autouse=True)
def in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Callable[..., Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny_model_dir("bert"))
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def test_only_what_is_named_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["train", "--model", "./model", "--dataset", "rows.jsonl", "--validation-split", "0.4",
             "--max-steps", "1", "--output-dir", "run", "-q", "--metrics", "f1,mcc"]  # fmt: skip
    assert run(given) == 0
    assert json.loads(Path("run/summary.json").read_text())["metrics"].keys() == {
        "loss", "f1", "mcc",
    }  # fmt: skip
    capsys.readouterr()
    for asked, names in (
        ([], {"loss", "f1", "mcc"}),
        (["--metrics", "accuracy"], {"loss", "accuracy"}),
    ):
        assert run(["evaluate", "run", "--json", "--resamples", "5", *asked]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["metrics"].keys() == names
        assert found["intervals"].keys() == names


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--model ./model --dataset rows.jsonl --metrics accurac",
         "no metric of --task text-classification is called 'accurac'. Did you mean "
         "'accuracy'? Metrics here: loss, accuracy, f1, mcc."),
        ("--metrics rougeL", "--metrics rougeL is of generated texts. Add --predict-with-generate"),
    ],
)  # fmt: skip
def test_what_is_refused(line: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--dry-run", *line.split()]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
