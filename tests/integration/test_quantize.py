"""`quantize`: equal to transformers tensor for tensor, measured, and never partial."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from ftlevel.cli.app import run
from ftlevel.commands.quantize import quantize
from ftlevel.config import QuantizeConfig
from ftlevel.errors import ConfigError, InputError
from ftlevel.events import NullListener
from ftlevel.models.kinds import checkpoint_class
from ftlevel.weights.quantize_shards import ShardWriter, get_modules_to_skip

ModelDir = Callable[..., Path]

FORMS: dict[str, dict[str, Any]] = {
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
    *(("llama", None, form, "bfloat16") for form in FORMS),
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


def make(source: Path, out: Path, form: str = "nf4", **more: Any) -> dict[str, Any]:
    fields = {"model": str(source), "out": out, "measure": False, **FORMS[form], **more}
    return dict(quantize(QuantizeConfig.model_validate(fields)).summary)


def load_weights(directory: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        weights |= load_file(str(file))
    return weights


def test_the_commit_of_a_hub_model_is_recorded(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = Path(constants.HF_HUB_CACHE) / "models--org--quantized"
    shutil.copytree(tiny_model_dir("llama"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    summary = make(Path("org/quantized"), tmp_path / "out")
    assert summary["source"]["revision"] == commit


@pytest.mark.parametrize(("family", "head", "form", "dtype"), CELLS)
def test_writes_what_transformers_saves(
    family: str, head: str | None, form: str, dtype: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    source = tiny_model_dir(family, head)
    summary = make(source, tmp_path / "out", form, dtype=dtype)
    config = transformers.AutoConfig.from_pretrained(source)
    name = checkpoint_class(config)
    kept = get_modules_to_skip(config, name)
    wish = transformers.BitsAndBytesConfig(**REFERENCE[form], llm_int8_skip_modules=kept)
    model = getattr(transformers, name).from_pretrained(
        source, quantization_config=wish, dtype=getattr(torch, dtype)
    )
    model.save_pretrained(tmp_path / "reference")
    expected, found = load_weights(tmp_path / "reference"), load_weights(tmp_path / "out")
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key
    layer = "Linear8bitLt" if form == "int8" else "Linear4bit"
    packed = [part for part in model.modules() if type(part).__name__ == layer]
    assert len(packed) == summary["quantized_linears"] > 0


def test_plain_transformers_loads_it_and_agrees(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    source = tiny_model_dir("llama")
    make(source, tmp_path / "out", dtype="float32")
    wish = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    expected = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=wish)
    found, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(5, 25)[None]
    for model in (expected, found):  # the CPU's packed form has no part in this
        for part in model.modules():
            if type(part).__name__ == "Linear4bit":
                part.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        assert torch.equal(expected(ids).logits, found(ids).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shards_keep_their_names_and_nothing_else_changes(
    family: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir(family))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="150KB")
    make(tmp_path / "sharded", tmp_path / "a")
    make(tiny_model_dir(family), tmp_path / "b")
    names = {path.name for path in (tmp_path / "sharded").glob("*.safetensors")}
    assert len(names) > 2
    assert {path.name for path in (tmp_path / "a").glob("*.safetensors")} == names
    sharded, whole = load_weights(tmp_path / "a"), load_weights(tmp_path / "b")
    assert sorted(sharded) == sorted(whole)
    assert all(torch.equal(sharded[key], whole[key]) for key in whole)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")  # through its index


@pytest.mark.parametrize(
    ("family", "head"), [("llama", None), ("bert", "mlm"), ("t5", None), ("mixtral", None)]
)
@pytest.mark.parametrize("form", ["nf4", "nf4-double", "int8"])
def test_a_dry_run_foretells_the_sizes(
    family: str, head: str | None, form: str, tiny_model_dir: ModelDir, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = tiny_model_dir(family, head)
    fields = {"model": str(source), "out": tmp_path / "out", **FORMS[form]}
    warnings: list[str] = []
    monkeypatch.setattr(NullListener, "warn", lambda _, message: warnings.append(message))
    config = QuantizeConfig.model_validate(fields)
    expected = quantize(config, dry_run=True).summary
    assert len(warnings) == (family == "mixtral")
    for warning in warnings:  # the sizes of the experts, as they stay and as train packs them
        stay, packed = expected["parts"]["experts"]["bytes"] / 1e6, "packs them while it loads them"
        assert warning.startswith(f"{stay:,.1f} MB of the {expected['bytes'] / 1e6:,.1f} MB are")
        assert (packed in warning) == (config.quant == "4bit")
    assert not (tmp_path / "out").exists()
    found = make(source, tmp_path / "out", form)
    assert expected["quantized_linears"] == found["quantized_linears"]
    assert set(expected["parts"]) == set(found["parts"])
    for name, part in found["parts"].items():
        assert expected["parts"][name]["bytes_before"] == part["bytes_before"]
        assert expected["parts"][name]["bytes"] == pytest.approx(part["bytes"], rel=0.01)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert found["bytes_on_disk"] == on_disk


@pytest.mark.parametrize(
    ("family", "head", "predicts"),
    [
        ("llama", None, "next tokens"),
        ("bert", "mlm", "masked tokens (15 %)"),
        ("t5", None, "the second half of each window, given the first"),
        ("bert", "seqcls", "hidden states (the model has no language head)"),
    ],
)
def test_measures_what_the_model_can_say(
    family: str, head: str | None, predicts: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    summary = make(
        tiny_model_dir(family, head), tmp_path / "out", measure=True, eval_tokens=600, device="cpu"
    )
    scores = summary["fidelity"]
    assert scores["predicts"] == predicts
    assert scores["windows"] == 3
    assert scores["positions"] > 40
    if head == "seqcls":
        assert 0.5 < scores["cosine_smallest"] <= scores["cosine"] < 1
    else:
        assert 0 < scores["kl"] < 1
        assert 0 < scores["top1_agreement"] < 1
        assert scores["perplexity"] == pytest.approx(scores["perplexity_source"], rel=0.5)
        assert math.isfinite(scores["kl_standard_error"])
    assert json.loads((tmp_path / "out/quantization.json").read_text()) == summary
    assert f"on {scores['positions']} positions" in (tmp_path / "out/README.md").read_text()


def test_eight_bits_are_nearer_than_four(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The parser reads a name and returns its value. " * 30)
    kl = {
        form: make(tiny_model_dir("llama"), tmp_path / form, form, measure=True, eval_text=text)[
            "fidelity"
        ]["kl"]
        for form in ("int8", "nf4", "fp4")
    }
    assert kl["int8"] < kl["nf4"] < kl["fp4"]


@pytest.mark.slow
def test_a_gguf_file_is_a_source(
    first_blocks_gguf: Path, first_blocks: Path, tmp_path: Path
) -> None:
    """SmolLM2's directory was converted from the .gguf, exactly."""
    make(first_blocks_gguf, tmp_path / "a", "int8", dtype="bfloat16")
    make(first_blocks, tmp_path / "b", "int8")
    expected, found = load_weights(tmp_path / "b"), load_weights(tmp_path / "a")
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--quant", "3bit", "--out", "x"], "--quant: '3bit' is not known. Expected one of 4bit"),
        (["--out", "x"], "--quant is missing: Quantization: 4bit, 8bit"),
        (["--quant", "4bit"], "--out is missing: Output directory; it must not exist."),
        (
            ["--quant", "8bit", "--double-quant", "--out", "x"],
            "--double-quant belongs to --quant 4bit, and --quant is 8bit.",
        ),
        (["--quant", "4bit", "--out", "."], "--out . exists and is not empty."),
        (
            ["--quant", "4bit", "--out", "x", "--eval-text", "nothing.txt"],
            "--eval-text nothing.txt cannot be read",
        ),
    ],
)
def test_refusals(
    arguments: list[str],
    complaint: str,
    tiny_model_dir: ModelDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    assert run(["quantize", str(tiny_model_dir("llama")), *arguments]) == 2
    assert complaint in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_is_quantized_is_not_quantized_again(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    make(tiny_model_dir("llama"), tmp_path / "out")
    with pytest.raises(ConfigError, match="is already quantized \\(4bit nf4\\)"):
        make(tmp_path / "out", tmp_path / "again")


def test_a_damaged_source_leaves_nothing_behind(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_model_dir("llama").iterdir():
        data = file.read_bytes()
        (source / file.name).write_bytes(data[:-500] if file.suffix == ".safetensors" else data)
    with pytest.raises(InputError, match="shorter than its header says"):
        make(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_lacks_a_weight_is_refused(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model_dir("llama"), source)
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights of its model: .*0\.mlp\.down_proj"):
        make(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("moments", [6, pytest.param(24, marks=pytest.mark.sweep)])
def test_killed_at_any_moment_it_is_absent_or_whole(
    tiny_model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moments: int
) -> None:
    source, out = tiny_model_dir("llama"), tmp_path / "out"
    make(source, tmp_path / "whole")
    expected = sorted(path.name for path in (tmp_path / "whole").iterdir())
    add = ShardWriter.add

    def add_slowly(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        time.sleep(0.002)  # 89 tensors
        add(self, name, tensor)

    copyfile = shutil.copyfile

    def copy_slowly(*arguments: Any, **more: Any) -> Any:
        time.sleep(0.03)
        return copyfile(*arguments, **more)

    monkeypatch.setattr(ShardWriter, "add", add_slowly)
    monkeypatch.setattr(shutil, "copyfile", copy_slowly)
    ended = {"killed": 0, "whole": 0}
    for number in range(0, 24, 24 // moments):
        child = os.fork()
        if child == 0:
            make(source, out)
            os._exit(0)
        time.sleep(0.03 * number)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        ended["whole" if out.exists() else "killed"] += 1
        if out.exists():
            assert sorted(path.name for path in out.iterdir()) == expected
            shutil.rmtree(out)
    assert ended["killed"]
    make(source, out)  # what a killed one left is no obstacle
    assert not list(tmp_path.glob(".*partial"))
