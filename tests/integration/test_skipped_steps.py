"""Steps with non-finite values or loss spikes: stop, skip or roll back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftlevel.cli.app import run
from ftlevel.training.trainer import FtlevelTrainer

ModelDir = Callable[..., Path]
STEPS = 12


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def command(tiny_model_dir: ModelDir, tmp_path: Path) -> list[str]:
    rows = [{"prompt": f"number {i} of many", "completion": f"it is {i}"} for i in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["train", "--quiet", "--model", str(tiny_model_dir("llama")), "--dataset", "rows.jsonl",
            "--task", "text-generation", "--batch-size", "4", "--max-steps", str(STEPS),
            "--logging-steps", "1", "--no-verify-fast", "--output-dir", "run"]  # fmt: skip


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Return what is trained, as it is before each step, while the run goes on."""
    seen: list[dict[str, torch.Tensor]] = []
    step = FtlevelTrainer.training_step

    def noted(self: Any, model: Any, *arguments: Any, **settings: Any) -> Any:
        weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        seen.append(weights)
        return step(self, model, *arguments, **settings)

    monkeypatch.setattr(FtlevelTrainer, "training_step", noted)
    return seen


def spoil(monkeypatch: pytest.MonkeyPatch, at: int, factor: float, *, once: bool = False) -> None:
    """Multiply the loss of the step after `at` others."""
    compute, done = FtlevelTrainer.compute_loss, []

    def spoiled(self: Any, model: Any, *arguments: Any, **settings: Any) -> Any:
        loss = compute(self, model, *arguments, **settings)
        if model.training and self.state.global_step == at and not (once and done):
            done.append(at)
            return loss * factor
        return loss

    monkeypatch.setattr(FtlevelTrainer, "compute_loss", spoiled)


def summary(name: str = "run") -> Any:
    return json.loads(Path(name, "summary.json").read_text())


def losses() -> list[float]:
    records = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_that_stops_names_the_rows_and_what_is_kept(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, 5, float("nan"))
    assert run([*command, "--save-steps", "2"]) == 1
    error = capsys.readouterr().err
    assert "the loss is nan at step 6. It had the rows " in error
    assert "checkpoint-4 is whole" in error
    rows = error.partition("It had the rows ")[2].partition(".")[0].split(", ")
    assert len(rows) == 4
    assert all(1 <= int(row) <= 64 for row in rows)


@pytest.mark.parametrize("fast", ["--fast", "--no-fast"])
def test_a_step_that_is_skipped_changes_nothing(
    command: list[str],
    trained: list[dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fast: str,
) -> None:
    spoil(monkeypatch, 5, float("nan"))
    assert run([*command, fast, "--on-nonfinite", "skip"]) == 0
    assert "the loss is nan at step 6: skipped. It had the rows " in capsys.readouterr().err
    same = [equal(a, b) for a, b in itertools.pairwise(trained)]
    assert same == [at == 5 for at in range(STEPS - 1)], "only that step changes nothing"
    noted = summary()["left_out"]
    assert [(note["step"], note["how"], len(note["rows"])) for note in noted] == [(6, "skipped", 4)]
    assert all(loss == loss for loss in losses())
    card = Path("run/README.md").read_text()
    assert "Skipped steps (loss not finite, or a spike): 1." in card


def test_a_run_goes_back_to_its_newest_checkpoint(
    command: list[str], trained: list[dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 7, float("inf"))
    assert run([*command, "--on-nonfinite", "rollback", "--save-steps", "3"]) == 0
    assert equal(trained[8], trained[6]), "the weights of checkpoint-6"
    assert not equal(trained[9], trained[8]), "and it goes on from them"
    assert summary()["left_out"][0]["how"] == "rolled back to checkpoint-6"
    rates = [json.loads(line)["learning_rate"]
             for line in Path("run/metrics.jsonl").read_text().splitlines()]  # fmt: skip
    steps = [a - b for a, b in itertools.pairwise(rates)]
    assert steps == pytest.approx([steps[0]] * len(steps)), "the schedule goes on"


def test_weights_that_are_broken_are_only_gone_back_from(
    command: list[str],
    trained: list[dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    create = FtlevelTrainer.create_optimizer

    def spoiling(self: Any, *arguments: Any, **settings: Any) -> Any:
        optimizer = create(self, *arguments, **settings)

        def spoil_weight(*_: object) -> None:
            if self.state.global_step == 5:
                optimizer.param_groups[0]["params"][0].data[0] = float("nan")

        optimizer.register_step_post_hook(spoil_weight)
        return optimizer

    monkeypatch.setattr(FtlevelTrainer, "create_optimizer", spoiling)
    assert run([*command, "--on-nonfinite", "skip"]) == 1
    assert "trained tensors are not finite after step 6" in capsys.readouterr().err
    trained.clear()
    more = ["--on-nonfinite", "rollback", "--save-steps", "5", "--overwrite"]
    assert run([*command, *more]) == 0
    assert equal(trained[6], trained[5]), "the weights of checkpoint-5"
    saved = load_file("run/adapter/adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.values())


def test_there_is_nothing_to_go_back_to(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, 2, float("nan"))
    assert run([*command, "--on-nonfinite", "rollback", "--save-steps", "9"]) == 1
    assert "has no checkpoint to go back to yet" in capsys.readouterr().err
    assert run([*command, "--on-nonfinite", "rollback", "--save-strategy", "no"]) == 2
    assert "--save-strategy no writes none" in capsys.readouterr().err
    assert run([*command, "--spike-factor", "3", "--method", "adalora", "--overwrite"]) == 2
    assert (
        "changes its shape during a run and cannot roll back to a checkpoint. Use --on-nonfinite "
        "skip, without --spike-factor." in capsys.readouterr().err
    )


def test_a_loss_that_leaps_is_gone_back_from_also_after_a_resume(
    command: list[str], trained: list[dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = [*command, "--spike-factor", "3", "--save-steps", "4"]
    assert run(guarded) == 0
    assert summary()["left_out"] == []
    plain = [dict(weights) for weights in trained]
    trained.clear()
    spoil(monkeypatch, 9, 10.0)
    assert run([*guarded, "--overwrite"]) == 0
    assert equal(trained[9], plain[9])
    assert equal(trained[10], trained[8]), "the weights of checkpoint-8"
    assert summary()["left_out"][0]["how"] == "rolled back to checkpoint-8"
    whole = load_file("run/adapter/adapter_model.safetensors")
    Path("run/summary.json").unlink()
    for late in Path("run/checkpoints").glob("checkpoint-12"):
        late.rename(late.with_name("other-12"))
    assert run([*guarded, "--resume"]) == 0
    assert equal(load_file("run/adapter/adapter_model.safetensors"), whole)
    assert [note["step"] for note in summary()["left_out"]] == [10]


def test_a_run_that_began_without_a_guard_goes_on_with_one(command: list[str]) -> None:
    assert run([*command, "--save-steps", "4"]) == 0
    Path("run/summary.json").unlink()
    Path("run/checkpoints/checkpoint-12").rename("other-12")
    assert run([*command, "--save-steps", "4", "--spike-factor", "3", "--resume"]) == 0
    assert summary()["left_out"] == []


def test_without_an_end_it_stops(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compute = FtlevelTrainer.compute_loss

    def spoiled(self: Any, model: Any, *arguments: Any, **settings: Any) -> Any:
        return compute(self, model, *arguments, **settings) * float("nan")

    monkeypatch.setattr(FtlevelTrainer, "compute_loss", spoiled)
    assert run([*command, "--on-nonfinite", "skip"]) == 1
    assert "as in the 10 steps before" in capsys.readouterr().err
