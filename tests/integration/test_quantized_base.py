"""Quantized directories as bases: LoRA, new heads, generation and rejected options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import task_data
from command_line import Cli
from ftlevel.cli.app import run
from ftlevel.commands.generate import generate
from ftlevel.commands.merge import merge
from ftlevel.commands.quantize import quantize
from ftlevel.commands.train import train
from ftlevel.config import MergeConfig, QuantConfig, QuantizeConfig
from ftlevel.errors import ConfigError
from ftlevel.trained.resolve import resolve_model
from run_files import ModelDir, read_json, read_losses, short_config
from sampling import sample


def quantize_model(source: Path, out: Path, **overrides: Any) -> Path:
    fields = {"model": str(source), "out": out, "measure": False, "quant": "4bit", **overrides}
    quantize(QuantizeConfig.model_validate(fields))
    return out


@pytest.mark.parametrize("quant", ["4bit", "8bit"])
def test_quantized_base_matches_quantization_while_loading(
    quant: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """Losses on the quantized directory equal those with --quant."""
    source = tiny_model_dir("llama")
    base = quantize_model(source, tmp_path / "base", quant=quant, dtype="float32")
    data = task_data.write(tmp_path / "data", "mask")
    losses = []
    for model, overrides in ((base, {}), (source, {"quant": {"kind": quant}})):
        out = tmp_path / f"run-{len(losses)}"
        summary = train(short_config(model, data, out, **overrides)).summary
        assert summary["proof"]["reload_difference"] <= 1e-4
        assert read_json(out / "adapter/ftlevel.json")["quantization"]["kind"] == quant
        losses.append(read_losses(out))
        answers, _ = generate(str(out), ["the parser"], max_new_tokens=4, device="cpu")
        assert len(answers) == 1
    assert losses[0] == losses[1]
    config = short_config(base, data, tmp_path / "again", quant={"kind": quant})
    train(config, dry_run=True)  # repeating the stored quantization is allowed


@pytest.mark.parametrize(("family", "head"), [("bert", "mlm"), ("llama", None), ("t5", None)])
def test_new_head_is_not_quantized(
    family: str, head: str | None, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    base = quantize_model(tiny_model_dir(family, head), tmp_path / "base", dtype="float32")
    data = task_data.write(tmp_path / "data", "class")
    result = train(short_config(base, data, tmp_path / "run", "text-classification"))
    heads = [part for name, part in result.model.named_modules() if hasattr(part, "weight")
             and name.endswith(("classifier", "score", "out_proj"))]  # fmt: skip
    assert heads
    assert all(part.weight.dtype == torch.float32 for part in heads)
    quantized = [p for p in result.model.modules() if type(p).__name__ == "Linear4bit"]
    assert quantized
    assert result.summary["proof"]["adapter_effect"] > 1e-3


@pytest.mark.parametrize(
    ("family", "quant"),
    [
        pytest.param("bert", "4bit", marks=pytest.mark.sweep),
        ("bert", "8bit"),
        ("t5", "4bit"),
    ],
)
def test_float32_quantized_base_trains_in_bfloat16(
    family: str, quant: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """Unquantized parameters have the same dtypes as after quantization while loading."""
    source = tiny_model_dir(family, "mlm" if family == "bert" else None)
    base = quantize_model(source, tmp_path / "base", quant=quant, dtype="float32")
    data = task_data.write(tmp_path / "data", "class")
    dtypes = []
    for model, overrides in ((base, {}), (source, {"quant": {"kind": quant}})):
        out = tmp_path / f"run-{len(dtypes)}"
        overrides["model"] = {"dtype": "bfloat16"}
        result = train(short_config(model, data, out, "text-classification", **overrides))
        assert result.summary["proof"]["reload_difference"] <= 1e-4
        dtypes.append({name: p.dtype for name, p in result.model.named_parameters()})
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
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
def test_options_unsupported_on_quantized_base_raise(
    overrides: dict[str, Any], message: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    base = quantize_model(tiny_model_dir("llama"), tmp_path / "base")
    data = task_data.write(tmp_path / "data", "class")
    with pytest.raises(ConfigError, match=message):
        train(short_config(base, data, tmp_path / "run", "text-classification", **overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "quantization",
    [{"quant_method": "hqq"}, {"quant_method": "gptq", "bits": 4},
     {"quant_method": "awq", "bits": 4}, {"quant_method": "new"}],
)  # fmt: skip
def test_unavailable_quantization_is_rejected_before_loading(
    quantization: dict[str, Any], tiny_model_dir: ModelDir, tmp_path: Path, cli: Cli
) -> None:
    base = quantize_model(tiny_model_dir("llama"), tmp_path / "base")
    config = {**read_json(base / "config.json"), "quantization_config": quantization}
    (base / "config.json").write_text(json.dumps(config))
    (base / "model.safetensors").write_bytes(b"not read")
    for command in (
        ["train", "--method", "lora", "--model", str(base), "--dry-run"],
        ["generate", str(base), "--prompt", "x"],
    ):
        error = cli.fails(*command)
        assert (
            f"is quantized by {quantization['quant_method']}, which cannot be loaded here" in error
        )
        assert len(error.splitlines()) == 1
    assert "is already quantized" in cli.fails(
        f"quantize {base} --quant 4bit --out {tmp_path / 'x'}"
    )


CELLS = [
    ("llama", "summarization", "pair", None),
    ("bert", "text-classification", "class", "mlm"),
    ("bert", "token-classification", "tags", "mlm"),
]


@pytest.mark.parametrize(
    ("method", "family", "task", "name", "head"),
    sample([(method, *cell) for cell in CELLS for method in ("lora", "full")]),
)
def test_quantized_model_keeps_task_labels_and_prompt(
    method: str,
    family: str,
    task: str,
    name: str,
    head: str | None,
    tiny_model_dir: ModelDir,
    tmp_path: Path,
    cli: Cli,
) -> None:
    """The card keeps task, labels and prompt, and records the quantization."""
    data = task_data.write(tmp_path / "data", name)
    columns = {"columns": {"document": "en", "summary": "de"}} if name == "pair" else {}
    train(
        short_config(
            tiny_model_dir(family, head), data, tmp_path / "run", task,
            method={"kind": method}, data=columns,
        )
    )  # fmt: skip
    float_dir = tmp_path / "run/adapter"
    if method == "lora":
        float_dir = tmp_path / "merged"
        merge(MergeConfig(adapters=[str(tmp_path / "run")], output_dir=float_dir, verify=False))
    quantized = quantize_model(float_dir, tmp_path / "packed", double_quant=True)
    before, after = (read_json(path / "ftlevel.json") for path in (float_dir, quantized))
    quantization = {"kind": "4bit", "quant_type": "nf4", "double_quant": True}
    assert after["quantization"] == quantization
    assert after["quantized"]["source"]["name"] == str(float_dir)
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {"quantization", "quantized"}
    readme = (quantized / "README.md").read_text()
    assert f"pipeline_tag: {task}" in readme
    assert "ftlevel generate packed --prompt" in readme
    loaded = resolve_model(str(quantized), device="cpu").load("cpu")
    reference = resolve_model(str(float_dir), device="cpu").load("cpu")
    assert loaded.ref.prompt_format == reference.ref.prompt_format
    assert (loaded.task, loaded.ref.labels) == (reference.task, reference.ref.labels)
    rows = ["--dataset", str(data), "--split", "validation", "--resamples", "0", "--json"]
    rows += ["--map", "document=en", "--map", "summary=de"] if columns else []
    stored_result = cli.json(f"evaluate {quantized}", *rows)
    assert stored_result["task"] == task
    assert stored_result["quantization"] == quantization
    quantized_while_loading = cli.json(f"evaluate {float_dir} --quant 4bit", *rows)
    assert stored_result["metrics"]["loss"] == pytest.approx(
        quantized_while_loading["metrics"]["loss"], rel=0.05
    )
    answer = cli.json(f"generate {quantized} --prompt 'the parser' --json")["answers"][0]
    assert bool(answer["text"]) or task == "summarization"


@pytest.mark.parametrize(
    ("kind", "other_kinds"), [("4bit", ("8bit", "none")), ("8bit", ("4bit", "none"))]
)
def test_evaluate_rejects_other_quantization_than_stored(
    kind: Literal["4bit", "8bit"],
    other_kinds: tuple[str, str],
    tiny_model_dir: ModelDir,
    tmp_path: Path,
    cli: Cli,
) -> None:
    base = quantize_model(tiny_model_dir("llama"), tmp_path / "base", quant=kind, dtype="float32")
    data = task_data.write(tmp_path / "data", "mask")
    train(short_config(base, data, tmp_path / "run", "text-generation"))
    for name in (base, tmp_path / "run"):
        command = ["evaluate", str(name), "--dataset", str(data), "--resamples", "0", "--no-base"]
        for options in ([], ["--quant", kind]):
            assert cli.json(*command, *options, "--json")["quantization"]["kind"] == kind
        for other_kind in other_kinds:
            error = cli.fails(*command, f"--quant {other_kind}")
            assert f"--quant {other_kind}: {base}" in error
            assert f"is stored quantized ({QuantConfig(kind=kind).form})" in error
            assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_gguf_base_in_4_bits_matches_directory(
    first_blocks_gguf: Path, first_blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2's directory was converted from the .gguf without loss, so losses are equal."""
    monkeypatch.chdir(tmp_path)
    task_data.write(tmp_path / "data", "mask")
    common = ["--method", "qlora", "--quant", "4bit", "--max-samples", "2", "--max-steps", "2",
              "--logging-steps", "1", "--dtype", "bfloat16", "--dataset", "data"]  # fmt: skip
    for name, model in (("gguf", first_blocks_gguf), ("plain", first_blocks)):
        assert run(["train", "--model", str(model), *common, "--output-dir", name]) == 0
    assert read_losses("gguf") == read_losses("plain")
    assert run(["evaluate", "gguf", "--split", "train", "--resamples", "0"]) == 0
