"""torchao quantization: equal to transformers, trainable, and named where missing."""

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


def make(source: Path, out: Path, kind: str, **more: Any) -> dict[str, Any]:
    fields = {"model": str(source), "out": out, "measure": False, "quant": kind, **more}
    return dict(quantize(QuantizeConfig.model_validate(fields)).summary)


def read(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors: dict[str, torch.Tensor] = {}
    notes: dict[str, Any] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            notes |= {key: json.loads(v) for key, v in file.metadata().items() if key != "format"}
    for note in notes.values():
        if isinstance(note, dict):
            note.get("_tensor_data_names", []).sort()  # a set's order, in torchao
    return tensors, notes


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("family", "head", "dtype"),
    [("llama", None, "bfloat16"), ("llama", "seqcls", "float32"), ("bert", "mlm", "bfloat16")],
)
def test_writes_what_transformers_saves(
    kind: str, family: str, head: str | None, dtype: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    source = tiny_model_dir(family, head)
    summary = make(source, tmp_path / "out", kind, dtype=dtype)
    config = transformers.AutoConfig.from_pretrained(source)
    name = {"seqcls": "AutoModelForSequenceClassification", "mlm": "AutoModelForMaskedLM"}.get(
        head or "", "AutoModelForCausalLM"
    )
    wish = build_torchao_config(kind)
    wish.modules_to_not_convert = get_modules_to_skip(config, name)
    model = getattr(transformers, name).from_pretrained(
        source, quantization_config=wish, dtype=getattr(torch, dtype)
    )
    model.save_pretrained(tmp_path / "reference")
    (expected, notes), (found, own) = read(tmp_path / "reference"), read(tmp_path / "out")
    ties = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key].view(torch.uint8), value.view(torch.uint8)), key
    ours, theirs = set(own.pop("tensor_names")), set(notes.pop("tensor_names"))
    assert ours == set(own)
    assert ours <= theirs <= ours | ties  # transformers names what it leaves out as tied
    assert own == {key: notes[key] for key in ours}
    fields = {"model": str(source), "out": tmp_path / "no", "quant": kind, "dtype": dtype}
    expected_sizes = quantize(QuantizeConfig.model_validate(fields), dry_run=True).summary
    for part, sizes in summary["parts"].items():
        assert expected_sizes["parts"][part]["bytes"] == sizes["bytes"], part
    assert summary["quantized_ratio"] > 3.5  # of the source, which is in float32


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_loads_its_shards(
    kind: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    source = tiny_model_dir("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="150KB")
    make(tmp_path / "sharded", tmp_path / "out", kind, dtype="float32")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    wish = build_torchao_config(kind)
    expected = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=wish)
    found, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        plain, packed, own = (m.eval()(ids).logits for m in (model, expected, found))
    assert torch.equal(packed, own)
    assert not torch.equal(plain, own)


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains_on_it_and_merging_is_refused(
    kind: str, tiny_model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    summary = make(
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
    check_the_run_is_used(tmp_path / "run", base, data, kind, capsys)
    assert run(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 2
    said = capsys.readouterr().err
    assert f"is stored quantized ({kind})" in said
    assert not (tmp_path / "merged").exists()
    for more, complaint in (
        ({"method": {"kind": "full"}}, f"is quantized by {kind}, for which PEFT supports"),
        ({"method": {"kind": "vera"}}, "Use --method lora"),
        ({"quant": {"kind": "4bit"}}, f"is already quantized \\({kind}\\)"),
    ):
        wrong = {**fields, **more, "output": {"dir": str(tmp_path / "wrong")}}
        with pytest.raises((ConfigError, InputError), match=complaint):
            train(TrainConfig.model_validate(wrong))


def check_the_run_is_used(
    trained: Path, base: Path, data: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`evaluate` and `generate` take the run and its base, and say what the weights are."""
    assert json.loads((trained / "adapter/ftlevel.json").read_text())["quantization"] == {
        "kind": kind
    }
    metrics = json.loads((trained / "summary.json").read_text())["metrics"]
    for name in (trained, base):
        command = ["evaluate", str(name), "--dataset", str(data), "--resamples", "0", "--device",
                   "cpu", "--split", "validation"]  # fmt: skip
        capsys.readouterr()
        assert run([*command, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["quantization"] == {"kind": kind}
        if name == trained:
            assert found["metrics"]["loss"] == metrics["loss"]
            assert found["base"]["loss"] > metrics["loss"]
        assert run([*command, "--quant", "4bit"]) == 2
        assert f"is stored quantized ({kind})" in capsys.readouterr().err
        assert run(["generate", str(name), "--prompt", "the parser", "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["answers"]) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_without_torchao_the_extra_is_named(
    kind: str, tiny_model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else find(name)
    )
    command = ["quantize", str(tiny_model_dir("llama")), "--quant", kind, "--out"]
    assert run([*command, str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "is not installed. Install it: pip install 'ftlevel[torchao]'" in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()
