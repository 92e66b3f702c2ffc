"""LoRA runs that also train embeddings or single tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ftlevel import MergeConfig, merge
from ftlevel.cli.app import run

TinyModelDir = Callable[..., Path]


@pytest.fixture(autouse=True)
def rows_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write rows.jsonl and change to its directory."""
    monkeypatch.chdir(tmp_path)
    texts = [f"the module number {i} of the list has the name {chr(97 + i) * 3}" for i in range(12)]
    Path("rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))


def train(base: Path, *options: str) -> int:
    return run(["train", "--model", str(base), "--dataset", "rows.jsonl", "--max-steps", "2",
                "--task", "text-generation", "--learning-rate", "1e-2", "--dtype", "float32",
                "--set", "data.max_eval_samples=2", "--output-dir", "run", "--quiet",
                *options])  # fmt: skip


def compute(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.arange(10, 60)[None]).logits
    return logits


TRAIN_EMBEDDINGS = ["--modules-to-save", "embed_tokens,lm_head"]


@pytest.mark.parametrize(
    ("tied", "settings", "trained", "untied"),
    [
        (False, TRAIN_EMBEDDINGS, {"model.embed_tokens", "lm_head"}, False),
        (True, TRAIN_EMBEDDINGS, {"model.embed_tokens", "lm_head"}, True),
        (True, [*TRAIN_EMBEDDINGS, "--set", "method.ensure_weight_tying=true"],
         {"model.embed_tokens", "lm_head"}, False),
        (True, ["--trainable-token-indices", "12,13"],
         {"model.embed_tokens.token_adapter"}, False),
        (True, ["--target-modules", "embed_tokens,q_proj"], set(), True),
        (False, ["--target-modules", "embed_tokens,lm_head,q_proj"], set(), False),
    ],
    ids=["full", "full-untied", "full-tied", "tokens", "lora", "lora-untied"],
)  # fmt: skip
def test_merged_embeddings_match_plain_peft(
    tied: bool,
    settings: list[str],
    trained: set[str],
    untied: bool,
    tiny_model_dir: TinyModelDir,
) -> None:
    base = tiny_model_dir("llama", tie_word_embeddings=tied)
    assert train(base, *settings) == 0
    saved = load_file("run/adapter/adapter_model.safetensors")
    full_weights = {
        name.removeprefix("base_model.model.") for name in saved if ".lora_" not in name
    }
    assert {name.rpartition(".")[0] for name in full_weights} == trained
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "run/adapter")
    result = merge(MergeConfig(adapters=["run"], output_dir=Path("merged")))
    assert result.summary["verified"]
    merged = AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(compute(merged), compute(reference.eval()), rtol=1e-4, atol=1e-5)
    assert merged.config.tie_word_embeddings is (tied and not untied)
    assert run(["evaluate", "run", "--resamples", "0", "--no-base"]) == 0


def test_resumed_embeddings_match_uninterrupted_run(tiny_model_dir: TinyModelDir) -> None:
    base = tiny_model_dir("llama", tie_word_embeddings=True)
    assert train(base, *TRAIN_EMBEDDINGS, "--save-steps", "1") == 0
    expected = load_file("run/adapter/adapter_model.safetensors")
    Path("run").rename("whole")
    assert train(base, *TRAIN_EMBEDDINGS, "--save-steps", "1") == 0
    for name in ("adapter", "summary.json"):
        path = Path("run", name)
        for part in path.iterdir() if path.is_dir() else ():
            part.unlink()
        path.rmdir() if path.is_dir() else path.unlink()
    import shutil

    shutil.rmtree("run/checkpoints/checkpoint-2")
    assert train(base, *TRAIN_EMBEDDINGS, "--save-steps", "1", "--resume") == 0
    resumed = load_file("run/adapter/adapter_model.safetensors")
    assert set(resumed) == set(expected)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--modules-to-save", "embed_token"],
         "'embed_token' is not a module of base. Did you mean 'embed_tokens'?"),
        (["--trainable-token-indices", "<tool>"],
         "'<tool>' is no token of the model, which has 704"),
        (["--trainable-token-indices", "704"], "704 is no token of the model"),
        (["--modules-to-save", "down_proj", "--method", "qlora"],
         "down_proj is quantized, and its integers cannot be trained"),
        (["--target-modules", "embed_tokens,q_proj", "--init", "pissa"],
         "model.embed_tokens is not a linear of a block, and --init pissa needs"),
        (["--set", "method.ensure_weight_tying=true"], "ensure_weight_tying needs an embedding"),
    ],
)  # fmt: skip
def test_untrainable_modules_are_rejected_before_loading(
    settings: list[str],
    message: str,
    tiny_model_dir: TinyModelDir,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("base").symlink_to(tiny_model_dir("llama"))
    assert train(Path("base"), *settings) == 2
    assert message in " ".join(capsys.readouterr().err.split())
