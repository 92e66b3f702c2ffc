"""Steps with non-finite values or loss spikes: stop, skip or roll back."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command_line import Cli
from ftlevel.cli.app import run
from ftlevel.training.trainer import FtlevelTrainer
from run_files import ModelDir, read_losses, read_summary, write_rows

pytestmark = pytest.mark.usefixtures("work_dir")

STEPS = 12


@pytest.fixture
def command(tiny_model_dir: ModelDir, tmp_path: Path) -> list[str]:
    rows = [{"prompt": f"number {i} of many", "completion": f"it is {i}"} for i in range(64)]
    write_rows(tmp_path / "rows.jsonl", rows)
    return ["train", "--quiet", "--model", str(tiny_model_dir("llama")), "--dataset", "rows.jsonl",
            "--task", "text-generation", "--batch-size", "4", "--max-steps", str(STEPS),
            "--logging-steps", "1", "--no-verify-fast", "--output-dir", "run"]  # fmt: skip


@pytest.fixture
def weights_by_step(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Return a list that receives the trainable weights before each step."""
    snapshots: list[dict[str, torch.Tensor]] = []
    original_step = FtlevelTrainer.training_step

    def record_weights(self: Any, model: Any, *arguments: Any, **settings: Any) -> Any:
        weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        snapshots.append(weights)
        return original_step(self, model, *arguments, **settings)

    monkeypatch.setattr(FtlevelTrainer, "training_step", record_weights)
    return snapshots


def scale_loss(
    monkeypatch: pytest.MonkeyPatch, at: int, factor: float, *, once: bool = False
) -> None:
    """Multiply the loss of the step after `at` steps by `factor`."""
    original, scaled_steps = FtlevelTrainer.compute_loss, []

    def compute_scaled_loss(self: Any, model: Any, *arguments: Any, **settings: Any) -> Any:
        loss = original(self, model, *arguments, **settings)
        if model.training and self.state.global_step == at and not (once and scaled_steps):
            scaled_steps.append(at)
            return loss * factor
        return loss

    monkeypatch.setattr(FtlevelTrainer, "compute_loss", compute_scaled_loss)


def are_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_nonfinite_loss_error_names_rows_and_checkpoint(
    command: list[str], monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    scale_loss(monkeypatch, 5, float("nan"))
    error = cli.fails(*command, "--save-steps 2", code=1)
    assert "the loss is nan at step 6. It had the rows " in error
    assert "checkpoint-4 is whole" in error
    rows = error.partition("It had the rows ")[2].partition(".")[0].split(", ")
    assert len(rows) == 4
    assert all(1 <= int(row) <= 64 for row in rows)


@pytest.mark.parametrize("fast", ["--fast", "--no-fast"])
def test_skipped_step_does_not_change_weights(
    command: list[str],
    weights_by_step: list[dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fast: str,
) -> None:
    scale_loss(monkeypatch, 5, float("nan"))
    assert run([*command, fast, "--on-nonfinite", "skip"]) == 0
    assert "the loss is nan at step 6: skipped. It had the rows " in capsys.readouterr().err
    unchanged = [are_equal(a, b) for a, b in itertools.pairwise(weights_by_step)]
    assert unchanged == [at == 5 for at in range(STEPS - 1)], "only that step changes nothing"
    notes = read_summary()["left_out"]
    assert [(note["step"], note["how"], len(note["rows"])) for note in notes] == [(6, "skipped", 4)]
    assert all(loss == loss for loss in read_losses())
    card = Path("run/README.md").read_text()
    assert "Skipped steps (loss not finite, or a spike): 1." in card


def test_rollback_restores_latest_checkpoint(
    command: list[str],
    weights_by_step: list[dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scale_loss(monkeypatch, 7, float("inf"))
    assert run([*command, "--on-nonfinite", "rollback", "--save-steps", "3"]) == 0
    assert are_equal(weights_by_step[8], weights_by_step[6]), "the weights of checkpoint-6"
    assert not are_equal(weights_by_step[9], weights_by_step[8]), "and it goes on from them"
    assert read_summary()["left_out"][0]["how"] == "rolled back to checkpoint-6"
    rates = [json.loads(line)["learning_rate"]
             for line in Path("run/metrics.jsonl").read_text().splitlines()]  # fmt: skip
    steps = [a - b for a, b in itertools.pairwise(rates)]
    assert steps == pytest.approx([steps[0]] * len(steps)), "the schedule goes on"


def test_nonfinite_weights_can_be_rolled_back_but_not_skipped(
    command: list[str],
    weights_by_step: list[dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    cli: Cli,
) -> None:
    create = FtlevelTrainer.create_optimizer

    def create_and_hook(self: Any, *arguments: Any, **settings: Any) -> Any:
        optimizer = create(self, *arguments, **settings)

        def set_weight_to_nan(*_: object) -> None:
            if self.state.global_step == 5:
                optimizer.param_groups[0]["params"][0].data[0] = float("nan")

        optimizer.register_step_post_hook(set_weight_to_nan)
        return optimizer

    monkeypatch.setattr(FtlevelTrainer, "create_optimizer", create_and_hook)
    error = cli.fails(*command, "--on-nonfinite skip", code=1)
    assert "trained tensors are not finite after step 6" in error
    weights_by_step.clear()
    options = ["--on-nonfinite", "rollback", "--save-steps", "5", "--overwrite"]
    cli(*command, *options)
    assert are_equal(weights_by_step[6], weights_by_step[5]), "the weights of checkpoint-5"
    saved = load_file("run/adapter/adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.values())


def test_rollback_without_checkpoint_is_rejected(
    command: list[str], monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    scale_loss(monkeypatch, 2, float("nan"))
    error = cli.fails(*command, "--on-nonfinite rollback --save-steps 9", code=1)
    assert "has no checkpoint to go back to yet" in error
    error = cli.fails(*command, "--on-nonfinite rollback --save-strategy no")
    assert (
        "cannot be used with --save-strategy no: it goes back to a checkpoint, and none is written"
        in error
    )
    error = cli.fails(*command, "--spike-factor 3 --method adalora --overwrite")
    assert (
        "changes its shape during a run and cannot roll back to a checkpoint. Use --on-nonfinite "
        "skip, without --spike-factor." in error
    )


def test_loss_spike_rolls_back_also_after_resume(
    command: list[str],
    weights_by_step: list[dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = [*command, "--spike-factor", "3", "--save-steps", "4"]
    assert run(options) == 0
    assert read_summary()["left_out"] == []
    reference = [dict(weights) for weights in weights_by_step]
    weights_by_step.clear()
    scale_loss(monkeypatch, 9, 10.0)
    assert run([*options, "--overwrite"]) == 0
    assert are_equal(weights_by_step[9], reference[9])
    assert are_equal(weights_by_step[10], weights_by_step[8]), "the weights of checkpoint-8"
    assert read_summary()["left_out"][0]["how"] == "rolled back to checkpoint-8"
    expected = load_file("run/adapter/adapter_model.safetensors")
    Path("run/summary.json").unlink()
    for checkpoint in Path("run/checkpoints").glob("checkpoint-12"):
        checkpoint.rename(checkpoint.with_name("other-12"))
    assert run([*options, "--resume"]) == 0
    assert are_equal(load_file("run/adapter/adapter_model.safetensors"), expected)
    assert [note["step"] for note in read_summary()["left_out"]] == [10]


def test_spike_factor_can_be_added_on_resume(command: list[str], cli: Cli) -> None:
    cli(*command, "--save-steps 4")
    Path("run/summary.json").unlink()
    Path("run/checkpoints/checkpoint-12").rename("other-12")
    cli(*command, "--save-steps 4 --spike-factor 3 --resume")
    assert read_summary()["left_out"] == []


def test_ten_skipped_steps_in_a_row_raise(
    command: list[str], monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    original = FtlevelTrainer.compute_loss

    def compute_scaled_loss(self: Any, model: Any, *arguments: Any, **settings: Any) -> Any:
        return original(self, model, *arguments, **settings) * float("nan")

    monkeypatch.setattr(FtlevelTrainer, "compute_loss", compute_scaled_loss)
    assert "as in the 10 steps before" in cli.fails(*command, "--on-nonfinite skip", code=1)
