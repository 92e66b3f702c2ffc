"""`plan`: estimates from a config, for other GPUs, what fits, and rejected arguments."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.models.llama import modeling_llama

from ftlevel.cli.app import run
from ftlevel.commands.plan import PlanOptions, RunPlan
from ftlevel.commands.plan import plan as run_plan
from ftlevel.config import TrainConfig
from ftlevel.training.forecast import seconds

ModelDir = Callable[..., Path]
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}  # fmt: skip


def plan(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert run(["plan", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


@pytest.fixture
def llama_8b_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


def test_plan_from_config_only(llama_8b_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ("--max-length", 1024, "--per-device-train-batch-size", 4)
    rows = (*rows, "--no-gradient-checkpointing", "--tokens-per-micro-batch", 4096)
    original_rope = modeling_llama.apply_rotary_pos_emb
    result = json.loads(
        plan(capsys, "--model", llama_8b_dir, "--gpu", "24GB", *rows, "--brief", "--json")
    )
    assert modeling_llama.apply_rotary_pos_emb is original_rope, "the plan's fast step is removed"
    assert result["peak_bytes"] == sum(result["parts"].values())
    assert result["memory_bytes"] == 24 * 2**30
    weights = 2 * (8_030_261_248)  # bfloat16
    assert result["parts"]["weights"] == pytest.approx(weights, rel=1e-3)
    assert not result["fits_in_memory"]
    assert result["imagined_rows"]
    assert result["seconds_per_epoch"] is None
    assert "--per-device-train-batch-size" in result["cheapest_change"]
    flags = result["cheapest_change"].split()
    changed = plan(
        capsys, "--model", llama_8b_dir, "--gpu", "24GB", *rows[:2], *flags, "--brief", "--json"
    )
    assert json.loads(changed)["fits_in_memory"]


def test_plan_for_1024_sharded_gpus(llama_8b_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", llama_8b_dir, "--gpu", "h100", "--max-length", 512, "--brief",
                 "--shard", "full", "--num-processes", 1024)  # fmt: skip
    result = json.loads(plan(capsys, *arguments, "--json"))
    weights, ranks = 2 * 8_030_261_248, 1024  # bfloat16
    assert result["parts"]["weights"] < weights / ranks + 2**20  # norms are not sharded
    embeddings, block = 2 * 2 * 128256 * 4096, 2 * 218_103_808
    assert result["parts"]["gathered"] == pytest.approx(embeddings + 3 * block, rel=0.01)
    assert result["seconds_per_epoch"] is None


@pytest.mark.slow
def test_micro_batch_is_largest_that_fits(
    llama_8b_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", llama_8b_dir, "--gpu", "24GB", "--max-length", 1024, "--batch-size", 8,
                 "--no-gradient-checkpointing", "--brief", "--json")  # fmt: skip
    whole = ("--tokens-per-micro-batch", 8 * 1024)
    assert not json.loads(plan(capsys, *arguments, *whole))["fits_in_memory"]
    result = json.loads(plan(capsys, *arguments))
    assert result["fits_in_memory"]
    (choice,) = (c for c in result["choices"] if c["name"] == "micro-batch")
    tokens = int(choice["value"].split()[0].replace(",", ""))
    assert 1024 <= tokens < 8 * 1024
    larger = ("--tokens-per-micro-batch", tokens + 1024)
    assert not json.loads(plan(capsys, *arguments, *larger))["fits_in_memory"]


def test_plan_adalora_without_fast_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("--method", "adalora", "--max-steps", 40, "--no-fast", "--brief", "--json")
    assert json.loads(plan(capsys, *arguments))["peak_bytes"] > 0


def test_rollout_memory_includes_kv_cache(
    llama_8b_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", llama_8b_dir, "--gpu", "80GB", "--max-length", 1024, "--brief",
                 "--json", "--per-device-train-batch-size", 1, "--task", "rl", "--reward", "exact",
                 "--gradient-checkpointing", "--max-completion-length", 960,
                 "--num-generations", 8)  # fmt: skip
    result = json.loads(plan(capsys, *arguments))
    token, prompts, rows = 2 * 32 * 8 * 128 * 2, 2, 16  # bytes per token; sampled at once
    assert result["at"] == "sampling"
    tokens = prompts * (64 + 32) + rows * (960 + 32)  # a prompt is cached once
    assert result["parts"]["keys and values"] == token * tokens
    small = [*arguments, "--num-generations", 64]
    small[small.index("80GB")] = "24GB"
    result = json.loads(plan(capsys, *small))  # as many rows are sampled together as fit
    cached = result["parts"]["keys and values"]
    assert 20 * token * (960 + 32) < cached < 0.8 * (24 * 2**30 - result["parts"]["weights"])
    on_server = json.loads(plan(capsys, *arguments, "--rollouts", "http://127.0.0.1:9"))
    assert "keys and values" not in on_server["parts"]
    assert on_server["peak_bytes"] < result["peak_bytes"]


def test_rollout_time_and_teacher_memory(
    tmp_path: Path, tiny_model_dir: ModelDir, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model = tmp_path / "rows.jsonl", tiny_model_dir("llama")
    data.write_text("".join('{"prompt": "the value", "answer": "an object"}\n' for _ in range(12)))
    arguments = ("--model", model, "--dataset", data, "--task", "rl", "--gpu", "h100", "--brief",
                 "--max-completion-length", 8)  # fmt: skip
    result = json.loads(plan(capsys, *arguments, "--reward", "exact", "--json"))
    assert 0.5 < result["time"]["sampling_share"] < 1
    assert "% of it sampling" in plan(capsys, *arguments, "--reward", "exact")
    repeated = json.loads(
        plan(capsys, *arguments, "--reward", "exact", "--num-iterations", 4, "--json")
    )
    sampling, training = (
        [each["seconds_per_epoch"] * share(each["time"]["sampling_share"])
         for each in (result, repeated)]
        for share in (lambda ratio: ratio, lambda ratio: 1 - ratio)
    )  # fmt: skip
    assert sampling[1] == pytest.approx(sampling[0])
    assert training[1] == pytest.approx(4 * training[0])
    distillation = json.loads(plan(capsys, *arguments, "--teacher", model, "--json"))
    weights = distillation["parts"]["weights"]
    assert distillation["parts"]["teacher and reward models"] == pytest.approx(weights, rel=0.01)


def test_plan_with_dataset_lists_fitting_settings(
    tmp_path: Path, tiny_model_dir: ModelDir, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join('{"text": "the value of an object"}\n' for _ in range(12)))
    arguments = ("--model", tiny_model_dir("llama"), "--dataset", data, "--gpu", "h100",
                 "--on-bad-row", "skip", "--price-per-hour", 2)  # fmt: skip
    result = json.loads(plan(capsys, *arguments, "--json"))
    assert result["fits_in_memory"]
    assert result["seconds_per_epoch"] > 0
    assert result["cost"] > 0
    assert result["steps_per_epoch"] == 2  # 12 rows, 8 per step; 3 epochs
    per_step = result["cost"] / 6
    brief = (*arguments, "--brief", "--json")
    for options, steps in ((("--max-steps", 1), 1), (("--max-steps", 9), 9)):
        cost = json.loads(plan(capsys, *brief, *options))["cost"]
        assert cost == pytest.approx(per_step * steps)
    one = result["checkpoint_bytes"]
    for options, count in (
        ((), 2),
        (("--save-strategy", "no"), 0),
        (("--save-strategy", "epoch", "--num-train-epochs", 1), 1),
        (("--save-steps", 1), 2),
        (("--save-steps", 5), 1),
        (("--save-steps", 1, "--save-total-limit", 9), 6),
    ):
        assert json.loads(plan(capsys, *brief, *options))["checkpoints_bytes"] == one * count
    flags = [fit["flags"] for fit in result["fits"]]
    for method in ("lora", "qlora", "full"):
        for checkpointing in ("--gradient-checkpointing", "--no-gradient-checkpointing"):
            assert any(f"--method {method} {checkpointing}" in line for line in flags)
    out = plan(capsys, *arguments[:-2], "--brief", "--num-processes", 4)
    assert out.splitlines()[0].startswith("fits: peak ")
    assert "H100" in out
    assert "an epoch: 1 steps" in out
    assert "(time: not estimated for several GPUs)" in out


@pytest.mark.parametrize("gpu", [(), ("--gpu", "h100"), ("--gpu", "24GB")])
def test_price_without_time_is_refused(
    llama_8b_dir: Path, capsys: pytest.CaptureFixture[str], gpu: tuple[str, ...]
) -> None:
    arguments = ("--model", llama_8b_dir, "--max-length", 128, "--price-per-hour", 2, *gpu)
    assert "--price-per-hour 2 needs an estimate of the time" in plan(capsys, *arguments, code=2)


def test_train_reports_planned_and_measured_memory(
    tmp_path: Path, tiny_model_dir: ModelDir, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"text": "the value of object {n}"}}\n' for n in range(12)))
    arguments = [
        "--model",
        str(tiny_model_dir("llama")),
        "--dataset",
        str(data),
        "--max-steps",
        "2",
    ]
    small, estimated = tmp_path / "small", tmp_path / "planned"
    assert run(["train", *arguments, "--output-dir", str(small)]) == 0
    output = capsys.readouterr().out
    assert "memory: not estimated (a small model: Python and its libraries take more)" in output
    assert json.loads((small / "summary.json").read_text())["plan"]["peak_bytes"] is None

    monkeypatch.setattr("ftlevel.training.forecast.fits.MIN_PARAMETERS", 0)
    assert run(["train", *arguments, "--output-dir", str(estimated)]) == 0
    first, *_, last = [line for line in capsys.readouterr().out.splitlines() if " planned" in line
                       or "memory: " in line]  # fmt: skip
    verdict, expected = first.split("memory: ")[1], json.loads(plan(capsys, *arguments, "--json"))
    assert "whole process" in plan(capsys, *arguments, "--brief")
    assert re.match(r"fits: peak 0\.00 GiB \(\d\.\d\d GiB whole process\), in the ", verdict)
    result = json.loads((estimated / "summary.json").read_text())["plan"]
    for name in ("peak_bytes", "parts", "at", "memory_bytes", "fits_in_memory"):
        assert result[name] == expected[name]
    assert 0 < result["measured_bytes"] < 2**31
    assert "GiB measured" in last
    for page in ("report.html", "README.md"):
        assert "GiB planned, " in (estimated / page).read_text()
        assert "GiB planned, " not in (small / page).read_text()
    weights = "adapter/adapter_model.safetensors"
    assert (estimated / weights).read_bytes() == (small / weights).read_bytes()  # no random draws


def test_probe_measures_steps(
    tmp_path: Path, tiny_model_dir: ModelDir, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"text": "the value of object {at}"}}\n' for at in range(12)))
    arguments = (
        "--model",
        tiny_model_dir("llama"),
        "--dataset",
        data,
        "--probe",
        "--brief",
        "--json",
    )
    result = json.loads(plan(capsys, *arguments))
    assert result["seconds_per_epoch"] > 0
    assert result["time"]["how"] == "4 steps here"


def test_probe_counts_steps_without_sampling(
    tmp_path: Path, tiny_model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    clock = iter([0.0, 2.0, *[0.0, 2.0, 5.0] * 4])  # a step samples for 2 s and trains for 3 s
    processor = iter([0.0, *[0.0, 5.0] * 4])
    fake = SimpleNamespace(perf_counter=lambda: next(clock), process_time=lambda: next(processor))
    monkeypatch.setattr(seconds, "time", fake)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join('{"prompt": "the value", "answer": "an object"}\n' for _ in range(12)))
    arguments = ("--model", tiny_model_dir("llama"), "--dataset", data, "--task", "rl", "--reward",
                 "exact", "--max-completion-length", 4, "--num-generations", 2,
                 "--per-device-train-batch-size", 3, "--num-iterations", 3)  # fmt: skip
    result = json.loads(plan(capsys, *arguments, "--probe", "--brief", "--json"))
    assert result["steps_per_epoch"] == 12
    assert result["seconds_per_epoch"] == pytest.approx(4 * (2 + 3 * 3))
    assert result["time"]["sampling_share"] == pytest.approx(2 / 11)


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize(
    ("name", "task", "weights"),
    [("smollm2", "text-generation", 134_515_008), ("minilm", "text-classification", 22_713_216)],
)
def test_weights_memory_of_real_models(
    name: str, task: str, weights: int, request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = request.getfixturevalue(name)
    arguments = ("--model", model, "--task", task, "--max-length", 64, "--dtype", "float32")
    result = json.loads(plan(capsys, *arguments, "--brief", "--json"))
    assert result["parts"]["weights"] == pytest.approx(4 * weights, rel=0.01)
    assert result["fits_in_memory"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--gpu", "h1000"), "--gpu h1000: unknown GPU. Did you mean 'h100'?"),
        (
            ("--gpu", "h100", "--probe"),
            "--probe cannot be used with --gpu: one runs steps on this machine, the other plans",
        ),
        (("--model", "builtin:tiny-llama", "--probe"), "--probe runs steps on real rows."),
        (
            ("--shard", "full", "--gpu", "h100"),
            "shards a model across GPUs. Add --num-processes N, the number of all GPUs, and --gpu",
        ),
    ],
)
def test_invalid_arguments_are_rejected(
    arguments: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in plan(capsys, *arguments, code=2)


def test_fitting_settings_are_computed_after_first_plan(tiny_model_dir: ModelDir) -> None:
    model = {"name_or_path": str(tiny_model_dir("llama"))}
    config = TrainConfig.model_validate({"model": model, "data": {"max_length": 16}})
    plans: list[RunPlan] = []

    def raise_eof() -> None:
        raise EOFError

    with pytest.raises(EOFError):
        run_plan(config, PlanOptions(), plans.append, raise_eof)
    (result,) = plans
    assert result.need.peak > 0
    assert not result.fits


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.sweep)])
def test_process_memory_matches_plan(method: str, minilm: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(
        json.dumps({"text": "a row of some words " * 20, "label": "ab"[at % 2]}) + "\n"
        for at in range(32)
    ))  # fmt: skip
    flags = ("--model", minilm, "--method", method, "--dataset", rows, "--max-steps", 2,
             "--output-dir", tmp_path / method)  # fmt: skip
    command = [sys.executable, "-m", "ftlevel", "train", *map(str, flags)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    summary = json.loads((tmp_path / method / "summary.json").read_text())["plan"]
    assert summary["process_bytes"] == pytest.approx(summary["measured_process_bytes"], rel=0.1)
