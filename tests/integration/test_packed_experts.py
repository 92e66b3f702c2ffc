"""Mixture-of-experts models with packed experts: training, resume, merge and errors."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from command_line import Cli
from ftlevel.cli.app import run
from run_files import ModelDir, read_json, read_summary, read_weights, train

pytestmark = pytest.mark.usefixtures("work_dir")

SHORT = ["--max-samples", "12", "--set", "data.max_eval_samples=4", "--batch-size", "4",
         "--dtype", "float32", "--overlong", "drop", "--lr-scheduler", "constant",
         "--save-strategy", "epoch"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("capfd")
@pytest.mark.parametrize("family", [pytest.param("mixtral", marks=pytest.mark.sweep), "qwen3_moe"])
def test_packed_experts_train_resume_evaluate_and_merge(
    family: str, tiny_model_dir: ModelDir, cli: Cli
) -> None:
    options = ["--model", str(tiny_model_dir(family, chat=True)), *SHORT, "--method", "qlora",
               "--double-quant", "--rslora"]  # fmt: skip
    captured = cli.run("train --output-dir whole", *options, "--epochs 2 --verify-fast")
    assert "experts: 4 bits, as the linear layers" in captured.out + captured.err
    assert "fast step verified on" in captured.out + captured.err
    card = read_json("whole/adapter/ftlevel.json")
    assert card["quantization"]["experts"] is True
    train(*options, "--epochs", "1")
    train("--resume", "--num-train-epochs", "2")
    assert read_weights("run") == read_weights("whole")
    loss = pytest.approx(read_summary("whole")["metrics"]["loss"], rel=1e-5)
    assert cli.json("evaluate whole --json")["metrics"]["loss"] == loss
    merged = cli.json("merge whole --out merged --onto dequantized --json")
    assert merged["candidates"]["dequantized"]["kl"] < 1e-6
    quantized = cli.json("merge whole --out served --quant 4bit --json")
    assert quantized["served"]["kl"] < 0.1 * quantized["effect"]["kl"]
    # transformers loads it without ftlevel: checkpoints do not have packed experts.
    stored = read_json("served/config.json")["quantization_config"]
    assert stored["quant_method"] == "bitsandbytes"
    AutoModelForCausalLM.from_pretrained("served")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--quant", "8bit"], "experts: in floating point (bitsandbytes supports 8 bits for "
                              "linear"),
        (["--quant", "4bit", "--target-parameters", "experts"],
         "experts: in floating point (they are adapted"),
        (["--quant", "4bit", "--set", "quant.experts=false"],
         "experts: in floating point (--set quant.experts=false)"),
    ],
)  # fmt: skip
def test_reason_for_unpacked_experts_is_reported(
    flags: list[str], text: str, tiny_model_dir: ModelDir, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(tiny_model_dir("mixtral", chat=True)), *SHORT]
    assert (
        run(["train", "--output-dir", "run", *options, *flags, "--max-steps", "1", "--dry-run"])
        == 0
    )
    captured = capfd.readouterr()
    assert text in " ".join((captured.out + captured.err).split())


def test_packed_experts_on_dense_model_are_rejected(tiny_model_dir: ModelDir, cli: Cli) -> None:
    flags = ["--quant", "4bit", "--set", "quant.experts=true", "--max-steps", "1", "--dry-run"]
    llama = str(tiny_model_dir("llama", chat=True))
    error = cli.fails(f"train --output-dir run --model {llama}", *SHORT, *flags)
    assert "the model has no experts in one tensor" in error
