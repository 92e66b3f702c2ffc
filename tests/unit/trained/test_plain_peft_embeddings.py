"""Adapters on embeddings and heads that plain PEFT wrote: the same logits here, and merged."""

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
NO_ROWS = "untied-resized-embed"
"""PEFT saves the embedding that is adapted, and not the output layer that grew with it."""
CASES = [
    f"{base}-{case}"
    for base in ("tied", "untied")
    for case in plain_peft.CASES
    if base == "tied" or case not in plain_peft.TIED_ONLY
]
PEFT_IS_WRONG = ("tied-embed", "tied-head", "tied-both", "tied-both-tied", "tied-resized-embed")
"""`merge_and_unload` adds the update of one of two layers that share a weight to both."""


@pytest.fixture(scope="module")
def written(tiny_model_dir: TinyModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with every case, written in a process that has imported plain PEFT alone."""
    folder = tmp_path_factory.mktemp("plain")
    rows = len(build_tokenizer("qwen2"))
    bases = [
        tiny_model_dir("qwen2", vocab_size=rows, tie_word_embeddings=tied) for tied in (False, True)
    ]
    process = Forked(call=(plain_peft.main, (*bases, folder)), imported="libraries")
    assert process.wait() == 0
    return folder


def base_of(adapter: Path) -> Any:
    name = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("case", [case for case in CASES if case != NO_ROWS])
def test_it_answers_and_merges_as_plain_peft_does(case: str, written: Path, tmp_path: Path) -> None:
    adapter, known = written / case, torch.load(f"{written / case}.pt")
    found = logits(load_adapter(base_of(adapter), adapter), known["ids"])
    assert torch.equal(found, known["logits"])
    result = merge(MergeConfig(adapters=[str(adapter)], output_dir=tmp_path / "out", verify=False))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    found, near = logits(merged, known["ids"]), 1e-6 * known["logits"].abs().max().item()
    torch.testing.assert_close(found, known["logits"], rtol=0, atol=near)
    if case not in PEFT_IS_WRONG:
        assert torch.equal(found, known["merged"])
    assert merged.config.tie_word_embeddings is not (
        case.startswith("untied") or result.summary["written"]["untied"]
    )


def test_tied_layers_stay_tied_where_peft_ties_the_adapter(written: Path, tmp_path: Path) -> None:
    for case, parted in (("tied-embed", True), ("tied-both-tied", False), ("tied-tokens", False)):
        out = tmp_path / case
        merge(MergeConfig(adapters=[str(written / case)], output_dir=out, verify=False))
        assert ("lm_head.weight" in load_file(out / "model.safetensors")) is parted


def test_rows_that_the_file_does_not_hold_are_refused(written: Path, tmp_path: Path) -> None:
    adapter = written / NO_ROWS
    with pytest.raises(InputError, match=r"9 more tokens .* no rows of the output layer"):
        load_adapter(base_of(adapter), adapter)
    with pytest.raises(InputError, match=r"lm_head\.weight: the adapter was trained with more"):
        merge(MergeConfig(adapters=[str(adapter)], output_dir=tmp_path / "out", verify=False))
    assert not (tmp_path / "out").exists()


def test_trained_rows_alone_are_enough_where_the_layers_share_them(
    written: Path, tmp_path: Path
) -> None:
    """As with `save_embedding_layers=False`: the base and the new rows are all there is."""
    adapter, known = (
        written / "tied-resized-tokens",
        torch.load(f"{written}/tied-resized-tokens.pt"),
    )
    saved = load_file(adapter / WEIGHTS)
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    kept = {name: saved[name] for name in saved if name == rows or "q_proj" in name}
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(kept, tmp_path / WEIGHTS)
    assert torch.equal(logits(load_adapter(base_of(adapter), tmp_path), known["ids"]),
                       known["logits"])  # fmt: skip
    merge(MergeConfig(adapters=[str(tmp_path)], output_dir=tmp_path / "out"))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), known["ids"])
    torch.testing.assert_close(found, known["logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
def test_a_prompt_of_plain_peft_answers_as_it_does_step_by_step(kind: str, written: Path) -> None:
    adapter, known = written / kind, torch.load(f"{written / kind}.pt")
    model = load_adapter(base_of(adapter), adapter)
    torch.testing.assert_close(logits(model, known["ids"]), known["logits"], rtol=0, atol=1e-6)
    answer = model.generate(input_ids=known["ids"], max_new_tokens=6, do_sample=False)
    assert torch.equal(answer, known["answer"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_type": "SEQ_CLS"}, "PROMPT_TUNING of PEFT for SEQ_CLS, where the head reads"),
        ({"peft_type": "PREFIX_TUNING"}, "of type PREFIX_TUNING, which PEFT .* Train one with"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused_with_the_reason(
    settings: dict[str, str], message: str, written: Path, tmp_path: Path
) -> None:
    config = json.loads((written / "prompt" / "adapter_config.json").read_text()) | settings
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes((written / "prompt" / WEIGHTS).read_bytes())
    with pytest.raises(InputError, match=message):
        load_adapter(base_of(tmp_path), tmp_path)


def test_another_vocabulary_stands_alone(written: Path, tmp_path: Path) -> None:
    first, grown = written / "tied-embed", written / "tied-resized"
    adapted = load_adapter(base_of(first), first)
    with pytest.raises(InputError, match="trained with 512 tokens, and here are 503"):
        add_adapter(adapted, grown, "grown")
    with pytest.raises(
        InputError, match=("cannot be loaded together with the others: a prompt that plain")
    ):
        add_adapter(adapted, written / "prompt", "prompt")
    names = [str(first), str(grown)]
    with pytest.raises(InputError, match="tied-resized cannot be mixed: it was trained with 512"):
        merge(MergeConfig(adapters=names, output_dir=tmp_path / "out", verify=False))


def test_new_tokens_are_evaluated_answered_and_exported(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = str(written / "tied-resized-tokens")
    Path("rows.jsonl").write_text('{"prompt": "the <new3> of", "completion": "a <new8>"}\n')
    assert run(["evaluate", adapter, "--dataset", "rows.jsonl", "--resamples", "0"]) == 0
    assert run(["generate", adapter, "--prompt", "a <new1>", "--max-new-tokens", "2"]) == 0
    assert run(["export", adapter, "--out", "x.gguf", "--quiet"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    assert tokenizer("<new8>")["input_ids"] == [len(tokenizer) - 1]
