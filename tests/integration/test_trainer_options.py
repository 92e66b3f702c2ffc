"""Options of transformers' Trainer, with the fast and the plain step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import task_data
from ftlevel.cli.app import run
from ftlevel.training.trainer import FtlevelTrainer
from run_files import ModelDir, read_rows, read_summary, write_rows

SHORT = ["--model", "tiny", "--batch-size", "4", "--dtype", "float32", "--learning-rate", "1e-3",
         "--logging-steps", "1",
         "--set", "train.predict_with_generate=false"]  # fmt: skip


@pytest.fixture(autouse=True)
def working_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: ModelDir) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").symlink_to(tiny_model_dir("llama", chat=True))
    task_data.write(Path("data"), "mask")


def train(*arguments: str, out: str) -> list[dict[str, Any]]:
    """Run `ftlevel train`; return its records."""
    rows = [] if "--train_file" in arguments else ["--dataset", "data"]
    assert run(["train", "--quiet", "--output-dir", out, *SHORT, *rows, *arguments]) == 0
    return read_rows(Path(out, "metrics.jsonl"))


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in records if "loss" in record]


ADAM = ["--adam-beta1", "0.5", "--adam-beta2", "0.9", "--adam-epsilon", "1e-4"]


def test_label_smoothing_and_adam_fast_step_matches_plain_step() -> None:
    options = ["--max-steps", "3", "--label-smoothing-factor", "0.2", *ADAM]
    fast, plain = train(*options, out="fast"), train(*options, "--no-fast", out="plain")
    assert len(losses(fast)) == 3
    for record, plain_record in zip(fast, plain, strict=True):
        assert record["tokens"] == plain_record["tokens"]
        for name in {"loss", "grad_norm", "eval_loss"} & record.keys():
            assert record[name] == pytest.approx(plain_record[name], rel=1e-4), name


def test_repeated_micro_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of a sharded model repeats micro-batches if another process has more."""
    options = ["--max-steps", "3", "--gradient-accumulation-steps", "2"]
    expected = train(*options, out="alone")
    monkeypatch.setattr(FtlevelTrainer, "num_forward_passes", lambda _, count: count + 1)
    records = train(*options, out="repeated")
    for name in ("tokens", "loss", "eval_loss"):
        assert [r.get(name) for r in records] == [r.get(name) for r in expected], name


def test_data_seed_determines_row_order() -> None:
    options = ["--max-steps", "1", "--eval-strategy", "no"]
    default = losses(train(*options, out="usual"))
    same = losses(train(*options, "--seed", "7", "--data-seed", "42", out="same"))
    other = losses(train(*options, "--data-seed", "7", out="other"))
    assert same == pytest.approx(default, rel=1e-6)  # a new LoRA does not change outputs
    assert abs(other[0] - default[0]) > 1e-3


def test_neftune_uses_plain_step() -> None:
    options = ["--max-steps", "2", "--eval-strategy", "no"]
    noisy = losses(train(*options, "--neftune-noise-alpha", "5", out="noisy"))
    plain = losses(train(*options, "--neftune-noise-alpha", "5", "--no-fast", out="plain"))
    assert noisy == pytest.approx(plain, rel=1e-4)
    without_noise = losses(train(*options, "--no-fast", out="quiet"))
    assert abs(noisy[0] - without_noise[0]) > 1e-3
    assert read_summary("noisy")["speed"] == {"fast": False}


def test_fractional_eval_steps_and_epoch_checkpoints() -> None:
    Path("held.jsonl").write_text('{"prompt": "Say one.", "completion": "one"}\n' * 3)
    write_rows("some.jsonl", ({"prompt": f"Say {n}.", "completion": str(n)} for n in range(8)))
    records = train(
        "--train_file", "some.jsonl", "--validation_file", "held.jsonl", "--epochs", "2",
        "--eval-steps", "0.5", "--save-strategy", "epoch", "--set", "data.gate.leaked=ignore",
        out="run",
    )  # fmt: skip
    assert [record["step"] for record in records if "eval_loss" in record] == [2, 4]
    checkpoints = sorted(path.name for path in Path("run/checkpoints").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]
    data = read_summary()["data"]
    assert (data["train_rows"], data["validation_rows"]) == (8, 3)
