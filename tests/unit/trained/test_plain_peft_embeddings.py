"""Tests of embedding and head adapters of plain PEFT: same logits when loaded and merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import plain_peft
from forked import Forked
from ftlevel import MergeConfig, merge
from ftlevel.cli.app import run
from ftlevel.errors import InputError
from ftlevel.trained.adapt import add_adapter, load_adapter
from tiny_tokenizers import build_tokenizer

TinyModelDir = Callable[..., Path]
WEIGHTS = "adapter_model.safetensors"
MISSING_ROWS = "untied-resized-embed"
"""PEFT saves the adapted embedding, but not the output layer that was resized with it."""
CASES = [
    f"{base}-{case}"
    for base in ("tied", "untied")
    for case in plain_peft.CASES
    if base == "tied" or case not in plain_peft.TIED_ONLY
]
INCORRECT_PEFT_MERGES = (
    "tied-embed",
    "tied-head",
    "tied-both",
    "tied-both-tied",
    "tied-resized-embed",
)
"""`merge_and_unload` adds the update of one of two layers that share a weight to both."""


@pytest.fixture(scope="module")
def peft_cases(tiny_model_dir: TinyModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with every case, written by a process that imported only plain PEFT."""
    directory = tmp_path_factory.mktemp("plain")
    vocab_size = len(build_tokenizer("qwen2"))
    bases = [
        tiny_model_dir("qwen2", vocab_size=vocab_size, tie_word_embeddings=tied)
        for tied in (False, True)
    ]
    process = Forked(call=(plain_peft.main, (*bases, directory)), imported="libraries")
    assert process.wait() == 0
    return directory


def load_base(adapter: Path) -> Any:
    name = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()


def compute_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


@pytest.mark.parametrize("case", [case for case in CASES if case != MISSING_ROWS])
def test_logits_and_merged_weights_match_plain_peft(
    case: str, peft_cases: Path, tmp_path: Path
) -> None:
    adapter, reference = peft_cases / case, torch.load(f"{peft_cases / case}.pt")
    actual = compute_logits(load_adapter(load_base(adapter), adapter), reference["ids"])
    assert torch.equal(actual, reference["logits"])
    result = merge(MergeConfig(adapters=[str(adapter)], output_dir=tmp_path / "out", verify=False))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    actual, tolerance = (
        compute_logits(merged, reference["ids"]),
        1e-6 * reference["logits"].abs().max().item(),
    )
    torch.testing.assert_close(actual, reference["logits"], rtol=0, atol=tolerance)
    if case not in INCORRECT_PEFT_MERGES:
        assert torch.equal(actual, reference["merged"])
    assert merged.config.tie_word_embeddings is not (
        case.startswith("untied") or result.summary["written"]["untied"]
    )


def test_merge_keeps_layers_tied_if_adapter_is_tied(peft_cases: Path, tmp_path: Path) -> None:
    for case, is_untied in (
        ("tied-embed", True),
        ("tied-both-tied", False),
        ("tied-tokens", False),
    ):
        out = tmp_path / case
        merge(MergeConfig(adapters=[str(peft_cases / case)], output_dir=out, verify=False))
        assert ("lm_head.weight" in load_file(out / "model.safetensors")) is is_untied


def test_missing_output_rows_raise(peft_cases: Path, tmp_path: Path) -> None:
    adapter = peft_cases / MISSING_ROWS
    with pytest.raises(InputError, match=r"9 more tokens .* no rows of the output layer"):
        load_adapter(load_base(adapter), adapter)
    with pytest.raises(InputError, match=r"lm_head\.weight: the adapter was trained with more"):
        merge(MergeConfig(adapters=[str(adapter)], output_dir=tmp_path / "out", verify=False))
    assert not (tmp_path / "out").exists()


def test_trained_rows_suffice_for_tied_layers(peft_cases: Path, tmp_path: Path) -> None:
    """As saved with `save_embedding_layers=False`: only the new rows are in the file."""
    adapter, reference = (
        peft_cases / "tied-resized-tokens",
        torch.load(f"{peft_cases}/tied-resized-tokens.pt"),
    )
    saved = load_file(adapter / WEIGHTS)
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    weights = {name: saved[name] for name in saved if name == rows or "q_proj" in name}
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(weights, tmp_path / WEIGHTS)
    assert torch.equal(compute_logits(load_adapter(load_base(adapter), tmp_path), reference["ids"]),
                       reference["logits"])  # fmt: skip
    merge(MergeConfig(adapters=[str(tmp_path)], output_dir=tmp_path / "out"))
    actual = compute_logits(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"), reference["ids"]
    )
    torch.testing.assert_close(actual, reference["logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
def test_plain_peft_prompt_gives_same_logits_and_tokens(kind: str, peft_cases: Path) -> None:
    adapter, reference = peft_cases / kind, torch.load(f"{peft_cases / kind}.pt")
    model = load_adapter(load_base(adapter), adapter)
    torch.testing.assert_close(
        compute_logits(model, reference["ids"]), reference["logits"], rtol=0, atol=1e-6
    )
    answer = model.generate(input_ids=reference["ids"], max_new_tokens=6, do_sample=False)
    assert torch.equal(answer, reference["answer"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_type": "SEQ_CLS"}, "PROMPT_TUNING of PEFT for SEQ_CLS, where the head reads"),
        ({"peft_type": "PREFIX_TUNING"}, "of type PREFIX_TUNING, which PEFT .* Train one with"),
    ],
)
def test_unsupported_plain_peft_prompt_raises(
    settings: dict[str, str], message: str, peft_cases: Path, tmp_path: Path
) -> None:
    config = json.loads((peft_cases / "prompt" / "adapter_config.json").read_text()) | settings
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes((peft_cases / "prompt" / WEIGHTS).read_bytes())
    with pytest.raises(InputError, match=message):
        load_adapter(load_base(tmp_path), tmp_path)


def test_adapters_with_different_vocabularies_cannot_be_combined(
    peft_cases: Path, tmp_path: Path
) -> None:
    first, resized = peft_cases / "tied-embed", peft_cases / "tied-resized"
    model = load_adapter(load_base(first), first)
    with pytest.raises(InputError, match="trained with 512 tokens and its base has 503"):
        add_adapter(model, resized, "grown")
    with pytest.raises(
        InputError, match=("cannot be loaded together with the others: a prompt trained by plain")
    ):
        add_adapter(model, peft_cases / "prompt", "prompt")
    names = [str(first), str(resized)]
    with pytest.raises(InputError, match="tied-resized cannot be mixed: it was trained with 512"):
        merge(MergeConfig(adapters=names, output_dir=tmp_path / "out", verify=False))


def test_adapter_with_new_tokens_evaluates_generates_and_exports(
    peft_cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = str(peft_cases / "tied-resized-tokens")
    Path("rows.jsonl").write_text('{"prompt": "the <new3> of", "completion": "a <new8>"}\n')
    assert run(["evaluate", adapter, "--dataset", "rows.jsonl", "--resamples", "0"]) == 0
    assert run(["generate", adapter, "--prompt", "a <new1>", "--max-new-tokens", "2"]) == 0
    assert run(["export", adapter, "--out", "x.gguf", "--quiet"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    assert tokenizer("<new8>")["input_ids"] == [len(tokenizer) - 1]
