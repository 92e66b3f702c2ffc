"""Adding a model family: one table row, tested with StableLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from additions.tree import FAMILY, run
from tiny_tokenizers import build_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def package_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILY.apply(tmp_path_factory.mktemp("tree"))


def test_adding_a_family_changes_one_line() -> None:
    assert len(FAMILY.touched) == len(FAMILY.lines) == 1


def test_list_targets_knows_added_family(package_dir: Path, tmp_path: Path) -> None:
    targets = json.loads(run(package_dir, "list-targets", "stablelm", "--json", cwd=tmp_path))
    assert "q_proj" in json.dumps(targets)


def test_added_family_trains_one_step(package_dir: Path, tmp_path: Path) -> None:
    from transformers import StableLmConfig, StableLmForCausalLM

    tokenizer = build_tokenizer("llama", None)
    config = StableLmConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    StableLmForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["train", "--model", "model", "--max-steps", "1", "--max-samples", "16", "--json"]
    summary = json.loads(run(package_dir, *command, "--output-dir", "run", cwd=tmp_path))
    assert summary["model"]["type"] == "stablelm"
    assert summary["proof"]["frozen_tensors"] > 0
