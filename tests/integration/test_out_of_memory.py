"""Out of memory: smaller micro-batches, or one error message."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from command_line import Cli
from ftlevel.cli.app import run
from ftlevel.config import TrainConfig
from ftlevel.errors import RunError
from ftlevel.training.memory import explain_out_of_memory
from ftlevel.training.trainer import FtlevelTrainer
from run_files import ModelDir, read_losses, read_summary

ALLOCATION_ERROR = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
TRAIN = ["train", "--quiet", "--model", "tiny", "--max-samples", "24", "--max-length", "128",
        "--overlong", "drop", "--max-steps", "3", "--logging-steps", "1", "--no-verify-fast",
        "--set", "data.max_eval_samples=8"]  # fmt: skip


@pytest.fixture(autouse=True)
def working_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: ModelDir) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").symlink_to(tiny_model_dir("llama", chat=True))


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that trains a run with enough memory once and returns its directory."""
    runs: dict[tuple[str, ...], Path] = {}

    def train(*arguments: str) -> Path:
        if arguments not in runs:
            out = tmp_path_factory.mktemp("whole") / "run"
            assert run([*TRAIN, *arguments, "--output-dir", str(out)]) == 0
            runs[arguments] = out
        return runs[arguments]

    return train


@pytest.fixture
def limit_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that makes steps of more than `max_tokens` tokens run out of memory."""

    def limit(max_tokens: int) -> None:
        original = FtlevelTrainer.compute_loss

        def compute_or_fail(self: Any, model: Any, inputs: Any, *args: Any, **settings: Any) -> Any:
            loss = original(self, model, inputs, *args, **settings)
            if model.training and int(inputs["attention_mask"].sum()) > max_tokens:
                for parameter in model.parameters():  # gradients of the failed backward pass
                    if parameter.requires_grad:
                        parameter.grad = torch.ones_like(parameter)
                raise RuntimeError(ALLOCATION_ERROR)
            return loss

        monkeypatch.setattr(FtlevelTrainer, "compute_loss", compute_or_fail)

    return limit


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.sweep), "2"])
def test_smaller_micro_batches_give_same_losses(
    reference_run: Callable[..., Path], limit_memory: Callable[[int], None],
    capsys: pytest.CaptureFixture[str], workers: str,
) -> None:  # fmt: skip
    options = ["--set", f"speed.parallel_workers={workers}", "--dtype", "float32"]
    reference = reference_run(*options)
    assert "out of memory" not in capsys.readouterr().err
    limit_memory(300)
    assert run([*TRAIN, *options, "--output-dir", "parts"]) == 0
    assert "out of memory at step 1: micro-batches have" in capsys.readouterr().err
    assert read_losses("parts") == pytest.approx(read_losses(reference), rel=1e-4)
    summaries = [read_summary(n) for n in (reference, "parts")]
    assert summaries[0]["speed"]["made_smaller_for_memory"] == []
    reductions = summaries[1]["speed"]["made_smaller_for_memory"]
    assert reductions[0]["step"] == 1
    assert (
        reductions[-1]["tokens_per_micro_batch"] == summaries[1]["speed"]["tokens_per_micro_batch"]
    )
    assert summaries[0]["timings"].keys() == summaries[1]["timings"].keys()
    tokens = [summary["speed"]["tokens_in_rows"] for summary in summaries]
    assert tokens[0] == tokens[1], "a row is counted once"


def test_resumed_run_keeps_smaller_micro_batches(
    limit_memory: Callable[[int], None], cli: Cli
) -> None:
    limit_memory(300)
    command = [*TRAIN, "--save-steps", "1"]
    cli(*command, "--output-dir whole")
    shutil.copytree("whole", "broken")
    for name in ("adapter", "checkpoints/checkpoint-3"):
        shutil.rmtree(Path("broken", name))
    Path("broken/summary.json").unlink()
    assert "out of memory" not in cli.run(*command, "--output-dir broken --resume").err, (
        "it does not fail again"
    )
    expected, actual = (Path(n, "adapter/adapter_model.safetensors") for n in ("whole", "broken"))
    assert expected.read_bytes() == actual.read_bytes()
    summaries = [read_summary(n) for n in ("whole", "broken")]
    reductions = [summary["speed"]["made_smaller_for_memory"] for summary in summaries]
    assert reductions[0] == reductions[1] != []


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.sweep)])
def test_single_row_falls_back_to_gradient_checkpointing(
    reference_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, cli: Cli, workers: str
) -> None:
    options = ["--set", f"speed.parallel_workers={workers}", "--dtype", "float32"]
    reference = reference_run(*options)
    original = FtlevelTrainer.compute_loss

    def compute_or_fail(self: Any, model: Any, inputs: Any, *args: Any, **settings: Any) -> Any:
        if model.training and not model.get_base_model().is_activation_checkpointing:
            raise RuntimeError(ALLOCATION_ERROR)
        return original(self, model, inputs, *args, **settings)

    monkeypatch.setattr(FtlevelTrainer, "compute_loss", compute_or_fail)
    assert (
        "with a single row: activations are recomputed from now on"
        in cli.run(*TRAIN, *options, "--output-dir parts").err
    )
    assert read_losses("parts") == pytest.approx(read_losses(reference), rel=1e-4)
    summary = read_summary("parts")
    reductions = summary["speed"]["made_smaller_for_memory"]
    assert reductions[-1] == {"step": 1, "gradient_checkpointing": True}


@pytest.mark.parametrize("failing_step", [1, pytest.param(2, marks=pytest.mark.sweep)])
def test_out_of_memory_in_later_step_is_retried(
    reference_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, cli: Cli, failing_step: int
) -> None:
    options = ["--dtype", "float32", "--gradient-checkpointing"]
    reference = reference_run(*options)
    original, failed = FtlevelTrainer.compute_loss, []

    def compute_or_fail(self: Any, model: Any, *args: Any, **settings: Any) -> Any:
        if model.training and self.state.global_step == failing_step and not failed:
            failed.append(failing_step)
            raise RuntimeError(ALLOCATION_ERROR)
        return original(self, model, *args, **settings)

    monkeypatch.setattr(FtlevelTrainer, "compute_loss", compute_or_fail)
    assert (
        f"out of memory at step {failing_step + 1}: micro-batches have"
        in cli.run(*TRAIN, *options, "--output-dir parts").err
    )
    assert read_losses("parts") == pytest.approx(read_losses(reference), rel=1e-4)


@pytest.mark.parametrize("fast", ["--fast", "--no-fast"])
def test_row_that_does_not_fit_is_reported(
    limit_memory: Callable[[int], None], cli: Cli, fast: str
) -> None:
    limit_memory(10)
    error = cli.fails(*TRAIN, fast, "--output-dir run", code=1).splitlines()[-1]
    assert error.startswith(
        f"ftlevel: out of memory: {ALLOCATION_ERROR}. To use less memory: --per-device-train"
    )
    assert "--gradient-checkpointing; --quant 4bit; a --max-length below 128" in error
    assert not Path("run/adapter").exists()


@pytest.mark.parametrize(("rows", "advice"), [(8, (4, 4)), (9, (3, 6)), (7, (1, 14))])
def test_advised_batch_keeps_rows_of_a_step(rows: int, advice: tuple[int, int]) -> None:
    train = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 2}
    planned: Any = SimpleNamespace(
        config=TrainConfig.model_validate({"train": train}),
        model=SimpleNamespace(config=LlamaConfig()),
        data=SimpleNamespace(max_length=0),
    )
    with pytest.raises(RunError) as caught, explain_out_of_memory(planned):
        raise MemoryError
    size, steps = advice
    flags = f"--per-device-train-batch-size {size} --gradient-accumulation-steps {steps} (the same"
    assert flags in str(caught.value)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("could not create a primitive"),
              torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")],
)  # fmt: skip
def test_out_of_memory_in_other_commands_is_reported(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raise_error(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("ftlevel.trained.model_ref.ModelRef.load", raise_error)
    assert run(["evaluate", "builtin:tiny-llama", "--task", "text-generation", "--quiet",
                "--dataset", "builtin:docstrings"]) == 1  # fmt: skip
    assert capsys.readouterr().err.startswith("ftlevel: out of memory: ")
