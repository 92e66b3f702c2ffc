"""Class weights in complete runs, with the fast and the plain step, and rejected options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import Cli
from ftlevel.cli.app import run
from run_files import ModelDir, read_summary, write_rows

SHORT = "--max-steps 3 --batch-size 6 --dtype float32 --lr 1e-3 --logging-steps 1 --quiet".split()
NER = [{"tokens": ["a", str(i)], "tags": ["O", "PER" if i % 4 else "LOC"]} for i in range(20)]


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: ModelDir) -> None:
    monkeypatch.chdir(tmp_path)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    Path("model").symlink_to(tiny_model_dir("bert", **no_dropout))
    rows = [{"text": f"say {i} more", "label": "rare" if i % 6 == 0 else "often"}
            for i in range(18)]  # fmt: skip
    multi = [{"text": f"say {i}", "labels": ["even"] * (i % 2 == 0) + ["third"] * (i % 3 == 0)}
             for i in range(18)]  # fmt: skip
    for name, dataset in (("classes", rows), ("several", multi), ("ner", NER)):
        write_rows(f"{name}.jsonl", dataset)


def train(*arguments: str, out: str) -> list[float]:
    assert run(["train", "--model", "./model", "--output-dir", out, *SHORT, *arguments]) == 0
    lines = Path(out, "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.parametrize(
    ("task", "data", "weights"),
    [
        ("text-classification", "classes.jsonl", ["--class-weights", "often=0.5,rare=4"]),
        ("text-classification", "several.jsonl", ["--class-weights", "balanced"]),
        ("token-classification", "ner.jsonl", ["--class-weight", "balanced"]),
        ("text-classification", "classes.jsonl", ["--focal-gamma", "2"]),
    ],
)
def test_fast_step_matches_plain_step(task: str, data: str, weights: list[str]) -> None:
    rows = ["--task", task, "--dataset", data]
    fast = train(*rows, *weights, out="fast")
    plain = train(*rows, *weights, "--no-fast", out="plain")
    assert fast == pytest.approx(plain, rel=1e-4)
    assert fast != pytest.approx(train(*rows, out="unweighted"), rel=1e-2)


def test_class_weights_are_reported_and_do_not_affect_evaluation() -> None:
    rows = ["--task", "text-classification", "--dataset", "classes.jsonl", "--eval-file",
            "classes.jsonl", "--set", "train.eval_on_start=true", "--set",
            "data.gate.leaked=ignore"]  # fmt: skip
    train(*rows, "--class-weights", "balanced", out="run")
    train(*rows, out="plain")
    summary, plain_summary = (read_summary(o) for o in ("run", "plain"))
    assert summary["class_weights"] == {"often": 18 / 30, "rare": 18 / 6}
    assert plain_summary["class_weights"] == {}
    lines = {choice["name"]: choice["value"] for choice in summary["choices"]}
    assert lines["class weights"] == "often 0.6, rare 3"
    assert summary["metrics_before"]["loss"] == pytest.approx(
        plain_summary["metrics_before"]["loss"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class-weights", "rae=3"], "there is no class 'rae'. Did you mean 'rare'? Classes"),
        (["--class-weights", "rare"], "--class-weights: 'rare': expected balanced, or"),
        (
            ["--class-weights", "rare=0"],
            "the weight of 'rare' is 0; a number above 0",
        ),
        (["--class-weights", "rare=,often=2"], "'rare=' is not NAME=VALUE"),
        (["--focal-gamma", "2", "--label-smoothing", "0.1"], "Drop one of them"),
        (["--focal-gamma", "-1"], "--focal-gamma"),
        (["--map", "label=number", "--focal-gamma", "2"], "these rows have none"),
    ],
)
def test_invalid_class_weights_are_rejected(arguments: list[str], message: str, cli: Cli) -> None:
    rows = [{"text": f"a {i}", "label": "rare" if i % 3 else "often", "number": i / 7}
            for i in range(9)]  # fmt: skip
    write_rows("rows.jsonl", rows)
    command = ["train", "--model", "./model", "--dry-run", "--dataset", "rows.jsonl", *arguments]
    assert message in " ".join(cli.fails(*command).split())


def test_class_weights_for_text_generation_are_rejected(cli: Cli) -> None:
    error = cli.fails("train --class-weights balanced --dry-run --max-samples 4")
    assert "and these rows have none. Drop it." in error
