"""torchao quantization: equality with transformers, training, and the missing package."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

import task_data
from ftlevel.cli.app import run
from ftlevel.commands.quantize import quantize
from ftlevel.commands.train import train
from ftlevel.config import QuantizeConfig, TrainConfig
from ftlevel.errors import ConfigError, InputError
from ftlevel.models.quantization import build_torchao_config
from ftlevel.weights.quantize_shards import get_modules_to_skip

ModelDir = Callable[..., Path]
KINDS = ("int8-torchao", "float8-torchao")
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is an extra"
)


def quantize_model(source: Path, out: Path, kind: str, **overrides: Any) -> dict[str, Any]:
    fields = {"model": str(source), "out": out, "measure": False, "quant": kind, **overrides}
    return dict(quantize(QuantizeConfig.model_validate(fields)).summary)


def read_checkpoint(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, Any] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata |= {
                key: json.loads(v) for key, v in file.metadata().items() if key != "format"
            }
    for entry in metadata.values():
        if isinstance(entry, dict):
            entry.get("_tensor_data_names", []).sort()  # a set's order, in torchao
    return tensors, metadata


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("family", "head", "dtype"),
    [("llama", None, "bfloat16"), ("llama", "seqcls", "float32"), ("bert", "mlm", "bfloat16")],
)
def test_torchao_weights_match_transformers(
    kind: str, family: str, head: str | None, dtype: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    source = tiny_model_dir(family, head)
    summary = quantize_model(source, tmp_path / "out", kind, dtype=dtype)
    config = transformers.AutoConfig.from_pretrained(source)
    name = {"seqcls": "AutoModelForSequenceClassification", "mlm": "AutoModelForMaskedLM"}.get(
        head or "", "AutoModelForCausalLM"
    )
    quantization = build_torchao_config(kind)
    quantization.modules_to_not_convert = get_modules_to_skip(config, name)
    model = getattr(transformers, name).from_pretrained(
        source, quantization_config=quantization, dtype=getattr(torch, dtype)
    )
    model.save_pretrained(tmp_path / "reference")
    (expected, metadata), (actual, actual_metadata) = (
        read_checkpoint(tmp_path / "reference"),
        read_checkpoint(tmp_path / "out"),
    )
    tied_names = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    assert sorted(actual) == sorted(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key].view(torch.uint8), value.view(torch.uint8)), key
    names, reference_names = (
        set(actual_metadata.pop("tensor_names")),
        set(metadata.pop("tensor_names")),
    )
    assert names == set(actual_metadata)
    assert names <= reference_names <= names | tied_names  # transformers also lists tied tensors
    assert actual_metadata == {key: metadata[key] for key in names}
    fields = {"model": str(source), "out": tmp_path / "no", "quant": kind, "dtype": dtype}
    expected_sizes = quantize(QuantizeConfig.model_validate(fields), dry_run=True).summary
    for part, sizes in summary["parts"].items():
        assert expected_sizes["parts"][part]["bytes"] == sizes["bytes"], part
    assert summary["quantized_ratio"] > 3.5  # relative to the float32 source


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_sharded_torchao_model(
    kind: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    source = tiny_model_dir("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="150KB")
    quantize_model(tmp_path / "sharded", tmp_path / "out", kind, dtype="float32")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    quantization = build_torchao_config(kind)
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=quantization
    )
    actual, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        float_logits, expected_logits, actual_logits = (
            m.eval()(ids).logits for m in (model, expected, actual)
        )
    assert torch.equal(expected_logits, actual_logits)
    assert not torch.equal(float_logits, actual_logits)


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains_on_torchao_base_and_merge_is_rejected(
    kind: str, tiny_model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    summary = quantize_model(
        tiny_model_dir("llama"), base, kind, dtype="float32", measure=True, eval_tokens=300
    )
    assert 0 < summary["fidelity"]["kl"] < 0.1
    data = task_data.write(tmp_path / "data", "mask")
    fields = {
        "model": {"name_or_path": str(base), "dtype": "float32", "device": "cpu"},
        "data": {"dataset": str(data)},
        "train": {"max_steps": 8, "learning_rate": 0.01, "logging_steps": 1},
        "output": {"dir": str(tmp_path / "run")},
    }
    result = train(TrainConfig.model_validate(fields)).summary
    assert result["proof"]["reload_difference"] <= 1e-4
    assert result["proof"]["adapter_effect"] > 1e-3
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    assert losses[-1] < losses[0]
    assert_run_is_usable(tmp_path / "run", base, data, kind, capsys)
    assert run(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 2
    error = capsys.readouterr().err
    assert f"is stored quantized ({kind})" in error
    assert not (tmp_path / "merged").exists()
    for overrides, message in (
        ({"method": {"kind": "full"}}, f"is quantized by {kind}, for which PEFT supports"),
        ({"method": {"kind": "vera"}}, "Use --method lora"),
        ({"quant": {"kind": "4bit"}}, f"is already quantized \\({kind}\\)"),
    ):
        invalid = {**fields, **overrides, "output": {"dir": str(tmp_path / "wrong")}}
        with pytest.raises((ConfigError, InputError), match=message):
            train(TrainConfig.model_validate(invalid))


def assert_run_is_usable(
    run_dir: Path, base: Path, data: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`evaluate` and `generate` accept the run and its base and report the quantization."""
    assert json.loads((run_dir / "adapter/ftlevel.json").read_text())["quantization"] == {
        "kind": kind
    }
    metrics = json.loads((run_dir / "summary.json").read_text())["metrics"]
    for name in (run_dir, base):
        command = ["evaluate", str(name), "--dataset", str(data), "--resamples", "0", "--device",
                   "cpu", "--split", "validation"]  # fmt: skip
        capsys.readouterr()
        assert run([*command, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["quantization"] == {"kind": kind}
        if name == run_dir:
            assert result["metrics"]["loss"] == metrics["loss"]
            assert result["base"]["loss"] > metrics["loss"]
        assert run([*command, "--quant", "4bit"]) == 2
        assert f"is stored quantized ({kind})" in capsys.readouterr().err
        assert run(["generate", str(name), "--prompt", "the parser", "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["answers"]) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_missing_torchao_names_extra(
    kind: str, tiny_model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "torchao" else original(name),
    )
    command = ["quantize", str(tiny_model_dir("llama")), "--quant", kind, "--out"]
    assert run([*command, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "is not installed. Install it: pip install 'ftlevel[torchao]'" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
