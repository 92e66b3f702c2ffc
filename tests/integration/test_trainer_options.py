"""Options of transformers' Trainer, with the fast and the plain step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftlevel.cli.app import run

SHORT = ["--max-samples", "16", "--max-length", "96", "--overlong", "drop", "--batch-size", "4",
         "--dtype", "float32", "--learning-rate", "1e-3", "--logging-steps", "1",
         "--set", "train.predict_with_generate=false",
         "--set", "data.max_eval_samples=8"]  # fmt: skip


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(*arguments: str, out: str) -> list[dict[str, Any]]:
    """Run `ftlevel train`; return its records."""
    assert run(["train", "--quiet", "--output-dir", out, *SHORT, *arguments]) == 0
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in records if "loss" in record]


ADAM = ["--adam-beta1", "0.5", "--adam-beta2", "0.9", "--adam-epsilon", "1e-4"]


def test_smoothed_labels_and_adam_fast_and_plain() -> None:
    short = ["--max-steps", "3", "--eval-strategy", "no", "--label-smoothing-factor", "0.2", *ADAM]
    fast = losses(train(*short, out="fast"))
    plain = losses(train(*short, "--no-fast", out="plain"))
    assert len(fast) == 3
    assert fast == pytest.approx(plain, rel=1e-4)


def test_a_seed_of_the_order_alone() -> None:
    short = ["--max-steps", "1", "--eval-strategy", "no"]
    usual = losses(train(*short, out="usual"))
    same = losses(train(*short, "--seed", "7", "--data-seed", "42", out="same"))
    other = losses(train(*short, "--data-seed", "7", out="other"))
    assert same == pytest.approx(usual, rel=1e-6)  # a LoRA adds nothing yet
    assert abs(other[0] - usual[0]) > 1e-3


def test_noise_needs_the_plain_step() -> None:
    short = ["--max-steps", "2", "--eval-strategy", "no"]
    noisy = losses(train(*short, "--neftune-noise-alpha", "5", out="noisy"))
    plain = losses(train(*short, "--neftune-noise-alpha", "5", "--no-fast", out="plain"))
    assert noisy == pytest.approx(plain, rel=1e-4)
    quiet = losses(train(*short, "--no-fast", out="quiet"))
    assert abs(noisy[0] - quiet[0]) > 1e-3
    assert json.loads(Path("noisy/summary.json").read_text())["speed"] == {"fast": False}


def test_shares_of_the_run_and_epochs() -> None:
    Path("held.jsonl").write_text('{"prompt": "Say one.", "completion": "one"}\n' * 3)
    Path("some.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {n}.", "completion": str(n)}) + "\n" for n in range(8))
    )
    records = train(
        "--train_file", "some.jsonl", "--validation_file", "held.jsonl", "--epochs", "2",
        "--eval-steps", "0.5", "--save-strategy", "epoch", "--set", "data.gate.leaked=ignore",
        out="run",
    )  # fmt: skip
    assert [record["step"] for record in records if "eval_loss" in record] == [2, 4]
    kept = sorted(path.name for path in Path("run/checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4"]
    data = json.loads(Path("run/summary.json").read_text())["data"]
    assert (data["train_rows"], data["validation_rows"]) == (8, 3)
