"""Tests of device and dtype selection on a GPU, with `torch.cuda` functions replaced."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from ftlevel.cli.app import run
from ftlevel.config import TrainConfig
from ftlevel.errors import ConfigError
from ftlevel.fast.plan import FastPlan
from ftlevel.models import loading
from ftlevel.models.hardware import select_device, select_dtype, select_tf32, uses_tf32, using_tf32
from ftlevel.models.sources import resolve_source
from ftlevel.models.upstream import libraries
from ftlevel.models.upstream.libraries import use_one_gpu
from ftlevel.training.build_trainer import create_training_args
from ftlevel.training.hooks import TrainingHooks
from ftlevel.training.plan.resolve import check_packages

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes torch report GPUs of a compute capability."""

    def set_gpu(capability: tuple[int, int], count: int = 1) -> None:
        for name, value in {
            "is_available": True,
            "is_bf16_supported": capability >= (8, 0),
            "get_device_capability": capability,
            "get_device_name": "a card",
            "device_count": count,
            "current_device": 0,
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)

    return set_gpu


def test_dtype_is_the_fast_one_of_the_gpu(fake_gpu):
    fake_gpu((8, 0))
    assert select_dtype("auto", "cuda", "llama").value == "bfloat16"
    fake_gpu((7, 5))
    choice = select_dtype("auto", "cuda", "llama")
    reason = "auto: the GPU has no bfloat16: its fast type is float16"
    assert (choice.value, choice.reason) == ("float16", reason)
    assert select_dtype("auto", "cuda", "llama", float32_weights=True).reason.endswith(
        "; weights in float32"
    )
    for family in ("t5", "mt5"):
        choice = select_dtype("auto", "cuda", family)
        assert choice.value == "float32"
        assert f"and {family} overflows float16" in choice.reason


def test_tf32_is_used_for_float32_on_ampere_only(fake_gpu):
    fake_gpu((8, 6))
    (choice,) = select_tf32(None, "cuda", "float32")
    assert "Ampere" in choice.reason
    assert uses_tf32(None, "cuda", "float32")
    assert not uses_tf32(False, "cuda", "float32")
    assert not select_tf32(False, "cuda", "float32")
    assert not select_tf32(None, "cuda", "bfloat16")
    assert not uses_tf32(True, "cuda", "bfloat16")
    fake_gpu((7, 5))
    assert not select_tf32(None, "cuda", "float32")
    with pytest.raises(ConfigError, match=r"--tf32: a card\. TF32 needs .* Ampere"):
        select_tf32(True, "cuda", "float32")


def test_using_tf32_restores_setting():
    with using_tf32(True):
        assert torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    with using_tf32(False):
        assert not torch.backends.cuda.matmul.allow_tf32


def test_one_of_several_gpus_is_used_and_reported(fake_gpu, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    fake_gpu((8, 0), count=4)
    choice = select_device("auto")
    assert choice.reason == "auto: a card, one of 4; --num-processes 4 trains on all of them"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert select_device("auto").reason == "auto: a card"


def test_use_one_gpu_disables_data_parallel(tmp_path):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=8
    )
    assert arguments.device.type == "cpu"
    arguments._n_gpu = 2  # as on a machine with two
    assert arguments.train_batch_size == 16
    use_one_gpu(arguments)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 8)


def test_training_arguments_are_limited_to_one_gpu(tmp_path, monkeypatch):
    calls: list[Any] = []
    monkeypatch.setattr("ftlevel.training.build_trainer.use_one_gpu", calls.append)
    run: Any = SimpleNamespace(
        config=TrainConfig(),
        fast=FastPlan(True),
        schedule=SimpleNamespace(learning_rate=1e-4, steps=100),
        hooks=TrainingHooks(),
        data=SimpleNamespace(validation=[]),
        model=SimpleNamespace(dtype="float32", device="cpu", family="llama"),
        objective=None,
    )
    arguments = create_training_args(run, tmp_path)
    assert calls == [arguments]


@pytest.mark.parametrize(("device", "expected"), [("cuda", {"": "cuda:0"}), ("cpu", None)])
def test_device_map_is_set_on_gpu_only(device, expected, fake_gpu, tiny_model_dir, monkeypatch):
    source = resolve_source(str(tiny_model_dir("llama")), None, False)
    options = {"dtype": torch.bfloat16, "device": device}
    fake_gpu((8, 0))
    load_arguments: dict[str, Any] = {}

    def stop(_, **arguments):
        load_arguments.update(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        loading.load_model(source, loading.load_config(source), "AutoModelForCausalLM", **options)
    assert load_arguments.get("device_map") == expected


def test_min_versions_match_pyproject():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = dict(re.findall(r'^  "([a-z-]+)>=([\d.]+)"', text, re.MULTILINE))
    assert {name: required[name] for name in libraries.MIN_VERSIONS} == libraries.MIN_VERSIONS


def test_outdated_library_raises_before_run(monkeypatch):
    config = TrainConfig()
    check_packages(config.model, config.output)
    versions = {"transformers": "5.17.0"}
    monkeypatch.setattr(libraries, "version", lambda name: versions.get(name, "9"))
    with pytest.raises(ConfigError) as error:
        check_packages(config.model, config.output)
    assert error.value.problems == [
        "transformers 5.17.0 is installed, and ftlevel needs transformers 5.25 or later. "
        'pip install --upgrade "transformers>=5.25".'
    ]


@pytest.mark.parametrize("quant", ["4bit", "8bit"])
def test_quantized_base_on_mps_is_rejected(quant, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["train", "--device", "mps", "--quant", quant, "--dry-run"]
    assert run(arguments) == 2
    assert f"--device mps: a base in {quant} is not trained on Apple's GPU" in (
        capsys.readouterr().err
    )
    assert run([*arguments[:3], "--dry-run"]) == 0
