"""Out of memory: smaller micro-batches, or one error message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ftlevel.cli.app import run
from ftlevel.training.trainer import FtlevelTrainer

FULL = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
ROWS = ["train", "--quiet", "--max-samples", "24", "--max-length", "128", "--overlong", "drop",
        "--max-steps", "3", "--logging-steps", "1", "--no-verify-fast",
        "--set", "data.max_eval_samples=8"]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def losses(name: str | Path) -> list[float]:
    records = map(json.loads, Path(name, "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives the directory of a run with enough memory, trained once."""
    trained: dict[tuple[str, ...], Path] = {}

    def train(*arguments: str) -> Path:
        if arguments not in trained:
            out = tmp_path_factory.mktemp("whole") / "run"
            assert run([*ROWS, *arguments, "--output-dir", str(out)]) == 0
            trained[arguments] = out
        return trained[arguments]

    return train


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return what makes a backward pass of more than so many places fail at its end."""

    def limit(places: int) -> None:
        compute = FtlevelTrainer.compute_loss

        def computed(self: Any, model: Any, inputs: Any, *args: Any, **settings: Any) -> Any:
            loss = compute(self, model, inputs, *args, **settings)
            if model.training and int(inputs["attention_mask"].sum()) > places:
                for parameter in model.parameters():  # what a backward pass has left
                    if parameter.requires_grad:
                        parameter.grad = torch.ones_like(parameter)
                raise RuntimeError(FULL)
            return loss

        monkeypatch.setattr(FtlevelTrainer, "compute_loss", computed)

    return limit


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.sweep), "2"])
def test_the_steps_are_the_same_in_smaller_parts(
    whole: Callable[..., Path], small_memory: Callable[[int], None],
    capsys: pytest.CaptureFixture[str], workers: str,
) -> None:  # fmt: skip
    more = ["--set", f"speed.parallel_workers={workers}", "--dtype", "float32"]
    enough = whole(*more)
    assert "out of memory" not in capsys.readouterr().err
    small_memory(300)
    assert run([*ROWS, *more, "--output-dir", "parts"]) == 0
    assert "out of memory before the first step: micro-batches have" in capsys.readouterr().err
    assert losses("parts") == pytest.approx(losses(enough), rel=1e-4)
    summaries = [json.loads(Path(n, "summary.json").read_text()) for n in (enough, "parts")]
    assert summaries[0]["speed"]["made_smaller_for_memory"] == []
    halved = summaries[1]["speed"]["made_smaller_for_memory"]
    assert {entry["step"] for entry in halved} == {0}, "the longest rows are tried first"
    assert halved[-1]["tokens_per_micro_batch"] == summaries[1]["speed"]["tokens_per_micro_batch"]
    assert summaries[0]["timings"].keys() == summaries[1]["timings"].keys()
    tokens = [summary["speed"]["tokens_in_rows"] for summary in summaries]
    assert tokens[0] == tokens[1], "a row is counted once"


def test_what_was_made_smaller_stays_so_when_the_run_goes_on(
    small_memory: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    small_memory(300)
    saving = [*ROWS, "--save-steps", "1"]
    assert run([*saving, "--output-dir", "whole"]) == 0
    shutil.copytree("whole", "broken")
    for name in ("adapter", "checkpoints/checkpoint-3"):
        shutil.rmtree(Path("broken", name))
    Path("broken/summary.json").unlink()
    capsys.readouterr()
    assert run([*saving, "--output-dir", "broken", "--resume"]) == 0
    assert "out of memory" not in capsys.readouterr().err, "it does not fail again"
    whole, broken = (Path(n, "adapter/adapter_model.safetensors") for n in ("whole", "broken"))
    assert whole.read_bytes() == broken.read_bytes()
    summaries = [json.loads(Path(n, "summary.json").read_text()) for n in ("whole", "broken")]
    done = [summary["speed"]["made_smaller_for_memory"] for summary in summaries]
    assert done[0] == done[1] != []


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.sweep)])
def test_a_row_alone_is_tried_with_checkpointing(
    whole: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], workers: str,
) -> None:  # fmt: skip
    more = ["--set", f"speed.parallel_workers={workers}", "--dtype", "float32"]
    enough = whole(*more)
    compute = FtlevelTrainer.compute_loss

    def computed(self: Any, model: Any, inputs: Any, *args: Any, **settings: Any) -> Any:
        if model.training and not model.get_base_model().is_activation_checkpointing:
            raise RuntimeError(FULL)
        return compute(self, model, inputs, *args, **settings)

    monkeypatch.setattr(FtlevelTrainer, "compute_loss", computed)
    capsys.readouterr()
    assert run([*ROWS, *more, "--output-dir", "parts"]) == 0
    assert "with a single row: activations are recomputed from now on" in capsys.readouterr().err
    assert losses("parts") == pytest.approx(losses(enough), rel=1e-4)
    summary = json.loads(Path("parts/summary.json").read_text())
    done = summary["speed"]["made_smaller_for_memory"]
    assert done[-1] == {"step": 0, "gradient_checkpointing": True}


@pytest.mark.parametrize("where", [1, pytest.param(2, marks=pytest.mark.sweep)])
def test_memory_that_fails_later_is_met_in_that_step(
    whole: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], where: int,
) -> None:  # fmt: skip
    more = ["--dtype", "float32", "--gradient-checkpointing"]
    enough = whole(*more)
    compute, failed = FtlevelTrainer.compute_loss, []

    def computed(self: Any, model: Any, *args: Any, **settings: Any) -> Any:
        if model.training and self.state.global_step == where and not failed:
            failed.append(where)
            raise RuntimeError(FULL)
        return compute(self, model, *args, **settings)

    monkeypatch.setattr(FtlevelTrainer, "compute_loss", computed)
    assert run([*ROWS, *more, "--output-dir", "parts"]) == 0
    assert f"out of memory at step {where + 1}: micro-batches have" in capsys.readouterr().err
    assert losses("parts") == pytest.approx(losses(enough), rel=1e-4)


@pytest.mark.parametrize("fast", ["--fast", "--no-fast"])
def test_a_row_that_does_not_fit_ends_the_run_in_a_line(
    small_memory: Callable[[int], None], capsys: pytest.CaptureFixture[str], fast: str
) -> None:
    small_memory(10)
    assert run([*ROWS, fast, "--output-dir", "run"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"ftlevel: out of memory: {FULL}. What takes less: --per-device-train")
    assert "--gradient-checkpointing; --quant 4bit; a --max-length below 128" in error
    assert not Path("run/adapter").exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("could not create a primitive"),
              torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")],
)  # fmt: skip
def test_any_command_that_runs_out_of_memory_says_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("ftlevel.trained.model_ref.ModelRef.load", full)
    assert run(["evaluate", "builtin:tiny-llama", "--task", "text-generation", "--quiet",
                "--dataset", "builtin:docstrings"]) == 1  # fmt: skip
    assert capsys.readouterr().err.startswith("ftlevel: out of memory: ")
