"""`quantize`: tensors equal to transformers', fidelity, and no partial output."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from command_line import Cli
from ftlevel.commands.quantize import quantize
from ftlevel.config import QuantizeConfig
from ftlevel.errors import ConfigError, InputError
from ftlevel.events import NullListener
from ftlevel.models.kinds import checkpoint_class
from ftlevel.weights.quantize_shards import ShardWriter, get_modules_to_skip
from run_files import ModelDir

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"quant": "4bit"},
    "nf4-double": {"quant": "4bit", "double_quant": True},
    "fp4": {"quant": "4bit", "quant_type": "fp4"},
    "int8": {"quant": "8bit"},
}
REFERENCE: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
CELLS = [
    *(("llama", None, format_, "bfloat16") for format_ in FORMATS),
    ("llama", "seqcls", "nf4", "float32"),
    ("gpt2", None, "nf4-double", "bfloat16"),
    ("gpt2", None, "int8", "float32"),
    ("t5", None, "nf4", "float16"),
    ("t5", None, "int8", "bfloat16"),
    ("bart", None, "nf4", "bfloat16"),
    ("bert", "mlm", "nf4-double", "bfloat16"),
    ("bert", "seqcls", "int8", "bfloat16"),
    ("mixtral", None, "nf4", "bfloat16"),
    ("qwen3_moe", None, "int8", "bfloat16"),
]


def quantize_model(
    source: Path, out: Path, format_: str = "nf4", **overrides: Any
) -> dict[str, Any]:
    fields = {"model": str(source), "out": out, "measure": False, **FORMATS[format_], **overrides}
    return dict(quantize(QuantizeConfig.model_validate(fields)).summary)


def load_weights(directory: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        weights |= load_file(str(file))
    return weights


def test_commit_of_hub_model_is_recorded(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = Path(constants.HF_HUB_CACHE) / "models--org--quantized"
    shutil.copytree(tiny_model_dir("llama"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    summary = quantize_model(Path("org/quantized"), tmp_path / "out")
    assert summary["source"]["revision"] == commit


@pytest.mark.parametrize(("family", "head", "format_", "dtype"), CELLS)
def test_quantized_weights_match_transformers(
    family: str,
    head: str | None,
    format_: str,
    dtype: str,
    tiny_model_dir: ModelDir,
    tmp_path: Path,
) -> None:
    source = tiny_model_dir(family, head)
    summary = quantize_model(source, tmp_path / "out", format_, dtype=dtype)
    config = transformers.AutoConfig.from_pretrained(source)
    name = checkpoint_class(config)
    skipped = get_modules_to_skip(config, name)
    quantization = transformers.BitsAndBytesConfig(
        **REFERENCE[format_], llm_int8_skip_modules=skipped
    )
    model = getattr(transformers, name).from_pretrained(
        source, quantization_config=quantization, dtype=getattr(torch, dtype)
    )
    model.save_pretrained(tmp_path / "reference")
    expected, actual = load_weights(tmp_path / "reference"), load_weights(tmp_path / "out")
    assert sorted(actual) == sorted(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key
    layer = "Linear8bitLt" if format_ == "int8" else "Linear4bit"
    packed = [module for module in model.modules() if type(module).__name__ == layer]
    assert len(packed) == summary["quantized_linears"] > 0


_SPLIT = {"vocab_size": 704, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 4, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize("format_", ["nf4", "int8"])
@pytest.mark.parametrize("model_type", ["nomic_bert", "gte", "jina_embeddings_v3", "sarvam_moe"])
def test_parts_of_a_stored_tensor_are_not_quantized(
    model_type: str, format_: str, tmp_path: Path
) -> None:
    """transformers joins queries, keys and values of these models when it saves them."""
    is_decoder = model_type == "sarvam_moe"
    more = {"num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4}
    config = transformers.AutoConfig.for_model(model_type, **_SPLIT, **(more if is_decoder else {}))
    auto = transformers.AutoModelForCausalLM if is_decoder else transformers.AutoModelForMaskedLM
    auto.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    summary = quantize_model(tmp_path / "base", tmp_path / "out", format_)
    base = auto.from_pretrained(tmp_path / "base")
    model, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    modules, expected = dict(model.named_modules()), dict(base.named_modules())
    parts = [name for name in expected if name.endswith(("q_proj", "k_proj", "v_proj"))]
    assert len(parts) == 6
    assert all(torch.equal(modules[name].weight, expected[name].weight) for name in parts)
    packed = [m for m in modules.values() if "bitsandbytes" in type(m).__module__]
    assert len(packed) == summary["quantized_linears"] > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sharded_model_quantizes_to_same_weights(
    family: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir(family))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="150KB")
    quantize_model(tmp_path / "sharded", tmp_path / "a")
    quantize_model(tiny_model_dir(family), tmp_path / "b")
    names = {path.name for path in (tmp_path / "sharded").glob("*.safetensors")}
    assert len(names) > 2
    assert {path.name for path in (tmp_path / "a").glob("*.safetensors")} == names
    sharded, unsharded = load_weights(tmp_path / "a"), load_weights(tmp_path / "b")
    assert sorted(sharded) == sorted(unsharded)
    assert all(torch.equal(sharded[key], unsharded[key]) for key in unsharded)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")  # through its index


def test_all_files_of_a_single_shard_with_index_are_saved(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    shard = "model-00001-of-00001.safetensors"
    source = shutil.copytree(tiny_model_dir("llama"), tmp_path / "source")
    index = {"weight_map": dict.fromkeys(load_file(source / "model.safetensors"), shard)}
    (source / "model.safetensors").rename(source / shard)
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    quantize_model(source, tmp_path / "out")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_chat_template("rag") == "{{ messages }}"
    config = json.loads((tmp_path / "out/config.json").read_text())  # for transformers 4
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("family", "head"), [("llama", None), ("bert", "mlm"), ("t5", None), ("mixtral", None)]
)
@pytest.mark.parametrize("format_", ["nf4", "nf4-double", "int8"])
def test_dry_run_sizes_match_actual_sizes(
    family: str, head: str | None, format_: str, tiny_model_dir: ModelDir, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = tiny_model_dir(family, head)
    fields = {"model": str(source), "out": tmp_path / "out", **FORMATS[format_]}
    warnings: list[str] = []
    monkeypatch.setattr(NullListener, "warn", lambda _, message: warnings.append(message))
    config = QuantizeConfig.model_validate(fields)
    expected = quantize(config, dry_run=True).summary
    assert len(warnings) == (family == "mixtral")
    for warning in warnings:  # sizes of the experts here and after packing in training
        kept_size, packed = (
            expected["parts"]["experts"]["bytes"] / 1e6,
            "packs them while it loads them",
        )
        assert warning.startswith(
            f"{kept_size:,.1f} MB of the {expected['bytes'] / 1e6:,.1f} MB are"
        )
        assert (packed in warning) == (config.quant == "4bit")
    assert not (tmp_path / "out").exists()
    actual = quantize_model(source, tmp_path / "out", format_)
    assert expected["quantized_linears"] == actual["quantized_linears"]
    assert set(expected["parts"]) == set(actual["parts"])
    for name, module in actual["parts"].items():
        assert expected["parts"][name]["bytes_before"] == module["bytes_before"]
        assert expected["parts"][name]["bytes"] == pytest.approx(module["bytes"], rel=0.01)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert actual["bytes_on_disk"] == on_disk


@pytest.mark.parametrize(
    ("family", "head", "target"),
    [
        ("llama", None, "next tokens"),
        ("bert", "mlm", "masked tokens (15 %)"),
        ("t5", None, "the second half of each window, given the first"),
        ("bert", "seqcls", "hidden states (the model has no language head)"),
    ],
)
def test_fidelity_is_measured_for_each_architecture(
    family: str, head: str | None, target: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    summary = quantize_model(
        tiny_model_dir(family, head), tmp_path / "out", measure=True, eval_tokens=600, device="cpu"
    )
    fidelity = summary["fidelity"]
    assert fidelity["predicts"] == target
    assert fidelity["windows"] == 3
    assert fidelity["positions"] > 40
    if head == "seqcls":
        assert 0.5 < fidelity["cosine_smallest"] <= fidelity["cosine"] < 1
    else:
        assert 0 < fidelity["kl"] < 1
        assert 0 < fidelity["top1_agreement"] < 1
        assert fidelity["perplexity"] == pytest.approx(fidelity["perplexity_source"], rel=0.5)
        assert math.isfinite(fidelity["kl_standard_error"])
    assert json.loads((tmp_path / "out/quantization.json").read_text()) == summary
    assert f"on {fidelity['positions']} positions" in (tmp_path / "out/README.md").read_text()


def test_int8_is_closer_than_4_bit(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The parser reads a name and returns its value. " * 30)
    kl = {
        format_: quantize_model(
            tiny_model_dir("llama"), tmp_path / format_, format_, measure=True, eval_text=text
        )["fidelity"]["kl"]
        for format_ in ("int8", "nf4", "fp4")
    }
    assert kl["int8"] < kl["nf4"] < kl["fp4"]


@pytest.mark.slow
def test_gguf_source_matches_directory(
    first_blocks_gguf: Path, first_blocks: Path, tmp_path: Path
) -> None:
    """SmolLM2's directory was converted from the .gguf without loss."""
    quantize_model(first_blocks_gguf, tmp_path / "a", "int8", dtype="bfloat16")
    quantize_model(first_blocks, tmp_path / "b", "int8")
    expected, actual = load_weights(tmp_path / "b"), load_weights(tmp_path / "a")
    assert sorted(actual) == sorted(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quant", "3bit", "--out", "x"], "--quant: '3bit' is not known. Expected one of 4bit"),
        (["--out", "x"], "--quant is missing: Quantization: 4bit or 8bit"),
        (["--quant", "4bit"], "--out is missing: Output directory; it must not exist."),
        (
            ["--quant", "8bit", "--double-quant", "--out", "x"],
            "--double-quant needs --quant 4bit (it is 8bit).",
        ),
        (["--quant", "4bit", "--out", "."], "--out . exists and is not empty."),
        (
            ["--quant", "4bit", "--out", "x", "--eval-text", "nothing.txt"],
            "--eval-text nothing.txt cannot be read",
        ),
    ],
)
def test_invalid_options_are_rejected(
    arguments: list[str],
    message: str,
    tiny_model_dir: ModelDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cli: Cli,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    assert message in cli.fails(f"quantize {tiny_model_dir('llama')}", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_quantized_source_raises(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    quantize_model(tiny_model_dir("llama"), tmp_path / "out")
    with pytest.raises(ConfigError, match="is already quantized \\(4bit nf4\\)"):
        quantize_model(tmp_path / "out", tmp_path / "again")


def test_truncated_source_raises_and_writes_nothing(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_model_dir("llama").iterdir():
        data = file.read_bytes()
        (source / file.name).write_bytes(data[:-500] if file.suffix == ".safetensors" else data)
    with pytest.raises(InputError, match="shorter than its header says"):
        quantize_model(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_source_with_missing_weight_raises(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model_dir("llama"), source)
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights of its model: .*0\.mlp\.down_proj"):
        quantize_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kills", [6, pytest.param(24, marks=pytest.mark.sweep)])
def test_killed_quantization_leaves_no_partial_output(
    tiny_model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    source, out = tiny_model_dir("llama"), tmp_path / "out"
    quantize_model(source, tmp_path / "whole")
    expected = sorted(path.name for path in (tmp_path / "whole").iterdir())
    add = ShardWriter.add

    def add_slowly(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        time.sleep(0.002)  # 89 tensors
        add(self, name, tensor)

    copyfile = shutil.copyfile

    def copy_slowly(*arguments: Any, **kwargs: Any) -> Any:
        time.sleep(0.03)
        return copyfile(*arguments, **kwargs)

    monkeypatch.setattr(ShardWriter, "add", add_slowly)
    monkeypatch.setattr(shutil, "copyfile", copy_slowly)
    outcomes = {"killed": 0, "whole": 0}
    for number in range(0, 24, 24 // kills):
        child = os.fork()
        if child == 0:
            quantize_model(source, out)
            os._exit(0)
        time.sleep(0.03 * number)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        outcomes["whole" if out.exists() else "killed"] += 1
        if out.exists():
            assert sorted(path.name for path in out.iterdir()) == expected
            shutil.rmtree(out)
    assert outcomes["killed"]
    quantize_model(source, out)  # leftovers of a killed process do not matter
    assert not list(tmp_path.glob(".*partial"))
