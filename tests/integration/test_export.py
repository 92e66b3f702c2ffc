"""`export`: files that transformers and llama.cpp load as the original model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGUFReader
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from command_line import Cli
from export_cases import (
    CASES,
    NAMES,
    ModelDir,
    compute_logits,
    create_ids,
    export_to,
    exportable_model,
    load_model,
)
from ftlevel.errors import FtlevelError, InputError, RunError
from ftlevel.extras.serving import gguf, gguf_families
from ftlevel.models.loading import load_tokenizer
from ftlevel.models.sources import resolve_source
from run_files import kill_repeatedly, write_rows
from tiny_tokenizers import build_tokenizer

pytestmark = pytest.mark.usefixtures("work_dir")


@pytest.fixture
def model_dir(tiny_model_dir: ModelDir, tmp_path: Path) -> ModelDir:
    """Return a factory of tiny models whose tokenizers llama.cpp supports."""
    return functools.partial(exportable_model, tiny_model_dir, tmp_path)


@pytest.mark.parametrize(("family", "overrides", "missing_settings"), CASES, ids=NAMES)
def test_exported_family_matches_model(
    model_dir: ModelDir, family: str, overrides: Mapping[str, Any], missing_settings: list[str]
) -> None:
    model = model_dir(family, **overrides)
    check = export_to("x.gguf", model, outtype="f32").summary["check"]
    assert check["settings_of_the_model"] == missing_settings
    assert check["beside_model"]["max_difference"] <= 1e-6
    assert check["beside_model"]["targets"] > 400
    if not missing_settings:  # transformers loads the same model from the file alone
        loaded = load_model(Path(), gguf_file="x.gguf")
        torch.testing.assert_close(
            compute_logits(loaded, create_ids()),
            compute_logits(load_model(model), create_ids()),
            rtol=0,
            atol=1e-6,
        )


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_narrow_outtype_matches_rounded_model(
    model_dir: ModelDir, family: str, outtype: str
) -> None:
    check = export_to("x.gguf", model_dir(family), outtype=outtype).summary["check"]
    assert check["beside_rounded"]["max_difference"] <= 1e-6
    assert 1e-6 < check["beside_model"]["max_difference"] < 0.1
    assert (
        abs(check["beside_model"]["kl"]) < 1e-3
    )  # for f16 it is below the rounding error of the sums


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_outtype_auto_keeps_dtype(model_dir: ModelDir, tmp_path: Path, dtype: str) -> None:
    model = load_model(model_dir("qwen2")).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "typed")
    build_tokenizer("qwen2").save_pretrained(tmp_path / "typed")
    summary = export_to("x.gguf", tmp_path / "typed").summary
    assert summary["outtype"] == {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    assert summary["check"]["beside_model"]["max_difference"] <= 1e-6


WRONG_FAMILIES: dict[str, Callable[[Any], Any]] = {
    "rows of queries and keys": lambda family: replace(family, interleaved=False),
    "norms": lambda family: replace(family, shifted_norms=True),
}


@pytest.mark.parametrize("error", WRONG_FAMILIES)
def test_wrong_export_raises_and_is_removed(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    model = model_dir("llama")
    family = WRONG_FAMILIES[error](gguf_families.FAMILIES["llama"])
    monkeypatch.setitem(gguf_families.FAMILIES, "llama", family)
    with pytest.raises(RunError, match="the file is not the model"):
        export_to("x.gguf", model, outtype="f32")
    assert [path.name for path in Path().iterdir()] == ["model"]


def test_wrong_tokenizer_in_file_raises(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_dir("qwen2")
    export_to("x.gguf", model)
    monkeypatch.setattr(gguf, "load_tokenizer", lambda _: build_tokenizer("opt"))  # of the file
    with pytest.raises(RunError, match="the file's tokenizer is not the model's"):
        export_to("y.gguf", model)
    assert sorted(path.name for path in Path().iterdir()) == ["x.Modelfile", "x.gguf"]


@pytest.mark.slow
def test_exported_run_generates_same_text(cli: Cli) -> None:
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i} + {i}."} for i in range(24)]
    write_rows("rows.jsonl", rows)
    cli(
        "train --method lora --dataset rows.jsonl --max-steps 4 --learning-rate 2e-2 "
        "--output-dir run --quiet"
    )
    summary = cli.json("export run --out run.gguf --outtype f32 --json")
    assert summary["merged"]["verified"]
    assert summary["method"] == "lora"
    assert summary["tokenizer"]["pre"] == "qwen2"
    assert sorted(path.name for path in Path().iterdir()) == (
        ["rows.jsonl", "run", "run.Modelfile", "run.gguf"]
    )
    lines = Path("run.Modelfile").read_text().splitlines()
    assert "FROM ./run.gguf" in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert "<|im_start|>user" in "\n".join(lines)
    texts = []
    for name in ("run", "run.gguf"):
        (answer,) = cli.json(
            f"generate {name} --prompt 'def add(a, b): return a + b' --max-new-tokens 12 --json"
        )["answers"]
        texts.append(answer["text"])
    assert texts[0] == texts[1] != ""


def write_adapter(base: Path, out: Path, **settings: Any) -> Path:
    torch.manual_seed(1)
    adapter = get_peft_model(load_model(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in adapter.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.05)
    adapter.save_pretrained(out, save_embedding_layers=False)
    return out


def test_adapter_on_tied_embedding_exports_separate_head(model_dir: ModelDir) -> None:
    base = model_dir("qwen2", tie_word_embeddings=True)
    adapter = write_adapter(base, Path("adapter"), r=4, target_modules=["embed_tokens", "q_proj"])
    summary = export_to("x.gguf", adapter, outtype="f32").summary
    assert summary["merged"]["verified"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(), gguf_file="x.gguf")
    assert len(tokenizer) <= 704
    assert load_tokenizer(resolve_source("x.gguf")).name_or_path == "x.gguf"
    names = {tensor.name for tensor in GGUFReader("x.gguf").tensors}
    assert {"output.weight", "token_embd.weight"} <= names
    loaded = load_model(Path(), gguf_file="x.gguf")
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)


REJECTED = [
    ("gpt_neo", {}, [], "gpt_neo is not among the families"),
    ("t5", {}, [], "t5 is not among the families"),
    ("gemma3_text", {}, [], "do not alternate five"),
    ("qwen2", {}, ["--out", "x.bin"], "x.bin does not end in .gguf"),
    ("qwen2", {}, ["--outtype", "q4_k"], "--outtype"),
    ("qwen2", {}, ["--format", "onnx"], "--format"),
]


@pytest.mark.parametrize(("family", "overrides", "arguments", "message"), REJECTED)
def test_unsupported_export_is_rejected_before_writing(
    tiny_model_dir: ModelDir,
    cli: Cli,
    family: str,
    overrides: dict[str, Any],
    arguments: list[str],
    message: str,
) -> None:
    model = tiny_model_dir(family, **overrides)
    assert message in cli.fails(f"export {model} --out x.gguf", *arguments)
    assert list(Path().iterdir()) == []


def test_export_of_classifier_or_gguf_file_raises(
    tiny_model_dir: ModelDir, model_dir: ModelDir
) -> None:
    with pytest.raises(
        InputError, match=r"was trained for text-classification, and a \.gguf file is for"
    ):
        export_to("x.gguf", tiny_model_dir("qwen2", "seqcls"))
    export_to("x.gguf", model_dir("qwen2"), verify=False)
    with pytest.raises(InputError, match=r"is a \.gguf file already"):
        export_to("y.gguf", "x.gguf")


def test_unmergeable_adapter_is_rejected(tiny_model_dir: ModelDir, cli: Cli) -> None:
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(load_model(tiny_model_dir("qwen2")), settings).save_pretrained("prompts")
    for options in ([], ["--dry-run"]):
        assert "prompts cannot be merged" in cli.fails("export prompts --out x.gguf", *options)
    assert [path.name for path in Path().iterdir()] == ["prompts"]


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_adapter_of_quantized_base_is_rejected(
    options: list[str], tiny_model_dir: ModelDir, cli: Cli
) -> None:
    cli(f"quantize {tiny_model_dir('gpt2')} --out base --quant 8bit --no-measure")
    model = load_model(Path("base"))
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained("adapter")
    assert "base is stored quantized" in cli.fails("export adapter --out x.gguf", *options)


def test_name_of_gguf_file_is_no_setting_of_the_model(tiny_model_dir: ModelDir) -> None:
    values = transformers.AutoConfig.from_pretrained(tiny_model_dir("gpt2")).to_dict()
    one, other = (transformers.GPT2Config(**values, _model_name_or_path=name) for name in "ab")
    assert gguf.readable_config(one, other)[1] == []


def test_existing_file_needs_overwrite(model_dir: ModelDir, cli: Cli) -> None:
    model = str(model_dir("qwen2"))
    for name in ("x.gguf", "x.Modelfile"):
        Path(name).write_text("mine")
        assert f"{name} exists" in cli.fails(f"export {model} --out x.gguf")
        assert Path(name).read_text() == "mine"
        if name == "x.gguf":
            Path(name).unlink()
    output = cli(f"export {model} --out x.gguf --overwrite --no-verify")
    assert "not verified (--no-verify)" in output
    assert Path("x.gguf").read_bytes()[:4] == b"GGUF"
    assert Path("x.Modelfile").read_text() != "mine"


def test_dry_run_writes_nothing(model_dir: ModelDir, cli: Cli) -> None:
    model = str(model_dir("gpt2"))
    summary = cli.json(f"export {model} --dry-run --outtype q8_0 --json")
    assert summary["dry_run"]
    assert list(Path().iterdir()) == []
    written = cli.json(f"export {model} --out x.gguf --outtype q8_0 --json")
    assert summary["tensor_bytes"] == written["tensor_bytes"] < written["size_bytes"]
    assert cli(f"export {model} --out y.gguf --outtype q8_0 --quiet") == ""


@pytest.mark.slow
@pytest.mark.parametrize("kills", [4, pytest.param(14, marks=pytest.mark.sweep)])
def test_killed_export_leaves_no_partial_file(model_dir: ModelDir, kills: int) -> None:
    model, out = model_dir("qwen2", num_hidden_layers=6), Path("x.gguf")

    def write() -> None:
        Path("x.Modelfile").unlink(missing_ok=True)
        export_to("x.gguf", model, verify=False)

    def assert_complete() -> None:
        assert out.read_bytes() == expected

    write()
    expected = out.read_bytes()
    out.unlink()
    kill_repeatedly(write, out, kills, assert_complete)


@pytest.mark.slow
@pytest.mark.parametrize("outtype", ["auto", pytest.param("q8_0", marks=pytest.mark.sweep)])
def test_export_of_real_weights_matches_model(first_blocks: Path, outtype: str) -> None:
    summary = export_to("x.gguf", first_blocks, outtype=outtype, verify_tokens=128).summary
    check = summary["check"]
    assert summary["tokenizer"]["pre"] == "smollm"
    assert check["beside_rounded"]["max_difference"] <= 1e-4
    assert check["settings_of_the_model"] == []
    if outtype == "auto":
        assert summary["outtype"] == "bf16"
        assert check["beside_model"]["max_difference"] == 0
    else:
        assert 0 < check["beside_model"]["kl"] < 0.01
        assert check["beside_model"]["top1"] > 0.95


def test_export_of_missing_model_raises() -> None:
    with pytest.raises(FtlevelError, match="does not exist"):
        export_to("x.gguf", "./nowhere")
