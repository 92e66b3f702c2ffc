"""Quantized directories as bases: LoRA, new heads, generation and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import task_data
from ftlevel.cli.app import run
from ftlevel.commands.generate import generate
from ftlevel.commands.merge import merge
from ftlevel.commands.quantize import quantize
from ftlevel.commands.train import train
from ftlevel.config import MergeConfig, QuantConfig, QuantizeConfig, TrainConfig
from ftlevel.errors import ConfigError
from ftlevel.trained.resolve import resolve_model
from sampling import sample

ModelDir = Callable[..., Path]


def make(source: Path, out: Path, **form: Any) -> Path:
    fields = {"model": str(source), "out": out, "measure": False, "quant": "4bit", **form}
    quantize(QuantizeConfig.model_validate(fields))
    return out


def configure(model: Path, data: Path, out: Path, task: str, **more: Any) -> TrainConfig:
    options = more.pop("options", {})
    return TrainConfig.model_validate(
        {
            "task": task,
            "model": {"name_or_path": str(model), "dtype": "float32", "device": "cpu"},
            "data": {"dataset": str(data), **options},
            "train": {"max_steps": 3, "learning_rate": 0.01, "logging_steps": 1},
            "output": {"dir": str(out)},
            **more,
        }
    )


@pytest.mark.parametrize("quant", ["4bit", "8bit"])
def test_trains_as_if_quantized_while_loading(
    quant: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """The run on the quantized directory is the run with --quant, number for number."""
    source = tiny_model_dir("llama")
    base = make(source, tmp_path / "base", quant=quant, dtype="float32")
    data = task_data.write(tmp_path / "data", "mask")
    losses = []
    for model, more in ((base, {}), (source, {"quant": {"kind": quant}})):
        out = tmp_path / f"run-{len(losses)}"
        config = configure(model, data, out, "text-generation", **more)
        summary = train(config).summary
        assert summary["proof"]["reload_difference"] <= 1e-4
        card = json.loads((out / "adapter/ftlevel.json").read_text())
        assert card["quantization"]["kind"] == quant
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([record["loss"] for record in records if "loss" in record])
        answers, _ = generate(str(out), ["the parser"], max_new_tokens=4, device="cpu")
        assert len(answers) == 1
    assert losses[0] == losses[1]
    again = TrainConfig.model_validate(
        {**config.model_dump(), "model": {"name_or_path": str(base), "dtype": "float32"},
         "quant": {"kind": quant}, "output": {"dir": str(tmp_path / "again")}}
    )  # fmt: skip
    train(again, dry_run=True)  # what the checkpoint is already may be said


@pytest.mark.parametrize(("family", "head"), [("bert", "mlm"), ("llama", None), ("t5", None)])
def test_a_new_head_stays_in_float(
    family: str, head: str | None, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    base = make(tiny_model_dir(family, head), tmp_path / "base", dtype="float32")
    data = task_data.write(tmp_path / "data", "class")
    result = train(configure(base, data, tmp_path / "run", "text-classification"))
    heads = [
        part
        for name, part in result.model.named_modules()
        if name.endswith(("classifier", "score", "out_proj")) and hasattr(part, "weight")
    ]
    assert heads
    assert all(part.weight.dtype == torch.float32 for part in heads)
    packed = [p for p in result.model.modules() if type(p).__name__ == "Linear4bit"]
    assert packed
    assert result.summary["proof"]["adapter_effect"] > 1e-3


@pytest.mark.parametrize(
    ("family", "quant"),
    [
        pytest.param("bert", "4bit", marks=pytest.mark.sweep),
        ("bert", "8bit"),
        ("t5", "4bit"),
    ],
)
def test_one_stored_in_float32_computes_in_bfloat16(
    family: str, quant: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """What is not quantized is as after quantizing while loading, and not of two precisions."""
    source = tiny_model_dir(family, "mlm" if family == "bert" else None)
    base = make(source, tmp_path / "base", quant=quant, dtype="float32")
    data = task_data.write(tmp_path / "data", "class")
    types = []
    for model, more in ((base, {}), (source, {"quant": {"kind": quant}})):
        out = tmp_path / f"run-{len(types)}"
        config = configure(model, data, out, "text-classification", **more)
        bfloat16 = config.model.model_copy(update={"dtype": "bfloat16"})
        result = train(config.model_copy(update={"model": bfloat16}))
        assert result.summary["proof"]["reload_difference"] <= 1e-4
        types.append({name: p.dtype for name, p in result.model.named_parameters()})
    assert types[0] == types[1]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (
            {"quant": {"kind": "8bit"}},
            r"is already quantized \(4bit nf4\), and --quant 8bit cannot be applied",
        ),
        ({"method": {"kind": "full"}}, "is quantized already \\(4bit nf4\\). --method full"),
        (
            {"method": {"kind": "lora", "init_lora_weights": "pissa"}},
            "is quantized already \\(4bit nf4\\). .*pissa",
        ),
    ],
)
def test_refusals(
    more: dict[str, Any], complaint: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    base = make(tiny_model_dir("llama"), tmp_path / "base")
    data = task_data.write(tmp_path / "data", "class")
    with pytest.raises(ConfigError, match=complaint):
        train(configure(base, data, tmp_path / "run", "text-classification", **more))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stored", "complaint"),
    [
        ({"quant_method": "hqq"}, "is quantized by hqq, which cannot be loaded here"),
        ({"quant_method": "gptq", "bits": 4}, "is quantized by gptq, which cannot be loaded here"),
        ({"quant_method": "awq", "bits": 4}, "is quantized by awq, which cannot be loaded here"),
        ({"quant_method": "new"}, "is quantized by new, which cannot be loaded here"),
    ],
)
def test_a_quantization_that_is_not_there_is_named_before_weights_load(
    stored: dict[str, Any],
    complaint: str,
    tiny_model_dir: ModelDir,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = make(tiny_model_dir("llama"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = stored
    (base / "config.json").write_text(json.dumps(config))
    (base / "model.safetensors").write_bytes(b"not read")
    for command in (
        ["train", "--method", "lora", "--model", str(base), "--dry-run"],
        ["generate", str(base), "--prompt", "x"],
    ):
        assert run(command) == 2
        said = capsys.readouterr().err
        assert complaint in said
        assert len(said.splitlines()) == 1
    assert run(["quantize", str(base), "--quant", "4bit", "--out", str(tmp_path / "x")]) == 2
    assert "is already quantized" in capsys.readouterr().err


CELLS = [
    ("llama", "summarization", "pair", None),
    ("bert", "text-classification", "class", "mlm"),
    ("bert", "token-classification", "tags", "mlm"),
]


@pytest.mark.parametrize(
    ("method", "family", "task", "name", "head"),
    sample([(method, *cell) for cell in CELLS for method in ("lora", "full")]),
)
def test_a_trained_model_keeps_its_task_in_quantized_form(
    method: str,
    family: str,
    task: str,
    name: str,
    head: str | None,
    tiny_model_dir: ModelDir,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Task, labels and prompt go with the weights, and the card says what they are now."""
    data = task_data.write(tmp_path / "data", name)
    columns = {"columns": {"document": "en", "summary": "de"}} if name == "pair" else {}
    train(
        configure(
            tiny_model_dir(family, head), data, tmp_path / "run", task,
            method={"kind": method}, options=columns,
        )
    )  # fmt: skip
    whole = tmp_path / "run/adapter"
    if method == "lora":
        whole = tmp_path / "merged"
        merge(MergeConfig(adapters=[str(tmp_path / "run")], output_dir=whole, verify=False))
    packed = make(whole, tmp_path / "packed", double_quant=True)
    before, after = (json.loads((p / "ftlevel.json").read_text()) for p in (whole, packed))
    now = {"kind": "4bit", "quant_type": "nf4", "double_quant": True}
    assert after["quantization"] == now
    assert after["quantized"]["source"]["name"] == str(whole)
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {"quantization", "quantized"}
    readme = (packed / "README.md").read_text()
    assert f"pipeline_tag: {task}" in readme
    assert "ftlevel generate packed --prompt" in readme
    loaded = resolve_model(str(packed), device="cpu").load("cpu")
    reference = resolve_model(str(whole), device="cpu").load("cpu")
    assert loaded.ref.prompt_format == reference.ref.prompt_format
    assert (loaded.task, loaded.ref.labels) == (reference.task, reference.ref.labels)
    rows = ["--dataset", str(data), "--split", "validation", "--resamples", "0", "--json"]
    rows += ["--map", "document=en", "--map", "summary=de"] if columns else []
    capsys.readouterr()
    assert run(["evaluate", str(packed), *rows]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == task
    assert found["quantization"] == now
    assert run(["evaluate", str(whole), "--quant", "4bit", *rows]) == 0
    live = json.loads(capsys.readouterr().out)
    assert found["metrics"]["loss"] == pytest.approx(live["metrics"]["loss"], rel=0.05)
    assert run(["generate", str(packed), "--prompt", "the parser", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["answers"][0]
    assert bool(answer["text"]) or task == "summarization"


@pytest.mark.parametrize(
    ("form", "wishes"), [("4bit", ("8bit", "none")), ("8bit", ("4bit", "none"))]
)
def test_evaluate_says_what_is_stored_and_refuses_another_wish(
    form: Literal["4bit", "8bit"],
    wishes: tuple[str, str],
    tiny_model_dir: ModelDir,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = make(tiny_model_dir("llama"), tmp_path / "base", quant=form, dtype="float32")
    data = task_data.write(tmp_path / "data", "mask")
    train(configure(base, data, tmp_path / "run", "text-generation"))
    for name in (base, tmp_path / "run"):
        command = ["evaluate", str(name), "--dataset", str(data), "--resamples", "0", "--no-base"]
        for wish in ([], ["--quant", form]):
            capsys.readouterr()
            assert run([*command, *wish, "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["quantization"]["kind"] == form
        for other in wishes:
            assert run([*command, "--quant", other]) == 2
            said = capsys.readouterr().err
            assert f"--quant {other}: {base}" in said
            assert f"is stored quantized ({QuantConfig(kind=form).form})" in said
            assert len(said.splitlines()) == 1


@pytest.mark.slow
def test_a_gguf_file_is_a_base_in_4_bits(
    first_blocks_gguf: Path, first_blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2's directory was converted from the .gguf, exactly: the runs are one run."""
    monkeypatch.chdir(tmp_path)
    common = ["--method", "qlora", "--quant", "4bit", "--max-samples", "2", "--max-steps", "2",
              "--logging-steps", "1", "--dtype", "bfloat16", "--max-length", "64",
              "--overlong", "truncate-prompt", "--set", "data.max_eval_samples=4",
              "--set", "data.subset=generation"]  # fmt: skip
    for name, model in (("gguf", first_blocks_gguf), ("plain", first_blocks)):
        assert run(["train", "--model", str(model), *common, "--output-dir", name]) == 0
    losses = {
        name: [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            if '"loss"' in line
        ]
        for name in ("gguf", "plain")
    }
    assert losses["gguf"] == losses["plain"]
    assert run(["evaluate", "gguf", "--split", "train", "--resamples", "0"]) == 0
