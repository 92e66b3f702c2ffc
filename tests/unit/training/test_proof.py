"""What is compared after a run does not grow with the rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny_models
from ftlevel.data.encoding.encode import Encoded
from ftlevel.errors import RunError
from ftlevel.tasks.classes import Classes
from ftlevel.tasks.losses import Tokens
from ftlevel.training.model import TensorHash, hash_tensor, hash_tensors
from ftlevel.training.proof import (
    MAX_TEST_LOGITS,
    NUM_TEST_ROWS,
    BaseState,
    CheckInputs,
    check_saved,
    collate_check_batch,
    compare_frozen,
)
from live_tensors import LiveTensors

VOCABULARY = 100_000
MOST = MAX_TEST_LOGITS // VOCABULARY // NUM_TEST_ROWS


def rows(length: int) -> list[Encoded]:
    return [Encoded(list(range(length)), list(range(length)), i) for i in range(9)]


@pytest.mark.parametrize("length", [10, 5000])
def test_the_scores_of_a_vocabulary_are_bounded(length: int) -> None:
    batch = collate_check_batch(
        rows(length), 0, "cpu", Tokens("perplexity", shifted=True), VOCABULARY
    )
    assert batch["input_ids"].shape == batch["labels"].shape == (NUM_TEST_ROWS, min(length, MOST))


def test_an_encoder_reads_all_of_a_row_whose_answer_is_cut() -> None:
    objective = Tokens("perplexity", feeds_labels=True)
    batch = collate_check_batch(rows(5000), 0, "cpu", objective, VOCABULARY)
    assert batch["input_ids"].shape == (NUM_TEST_ROWS, 5000)
    assert batch["labels"].shape == (NUM_TEST_ROWS, MOST)


def test_a_class_is_of_the_whole_row() -> None:
    texts = [Encoded([1] * 5000, 2, i) for i in range(2)]
    batch = collate_check_batch(texts, 0, "cpu", Classes("accuracy"), VOCABULARY)
    assert batch["input_ids"].shape == (2, 5000)


def test_a_frozen_weight_that_was_only_cast_is_unchanged() -> None:
    """Switch Transformers holds its router in float32, whatever it was loaded in."""
    trained = tiny_models.build("llama").bfloat16().requires_grad_(False)
    digests = hash_tensors(trained.named_parameters())
    count = compare_frozen(trained, digests)
    trained.model.norm.float()
    assert compare_frozen(trained, digests) == count
    trained.model.norm.weight[0] += 1e-3
    with pytest.raises(RunError, match=r"1 frozen tensors changed while training: model\.norm"):
        compare_frozen(trained, digests)


def saved(tmp_path: Path, **settings: Any) -> tuple[Any, Mapping[str, TensorHash]]:
    """Return a trained model whose adapter is saved in `tmp_path`, and the base's digests."""
    base = tiny_models.build("llama", intermediate_size=4096)
    digests = hash_tensors(base.named_parameters())
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, **settings)
    trained = get_peft_model(base, config)
    trained.save_pretrained(tmp_path)
    return trained, digests


def probe() -> CheckInputs:
    return CheckInputs(tiny_models.build_batch("llama"), Tokens("perplexity", shifted=True), "cpu",
                 "float32")  # fmt: skip


def load_no_base() -> Any:
    raise AssertionError("the base was loaded a second time")


def test_the_proof_loads_no_base(tmp_path: Path) -> None:
    trained, digests = saved(tmp_path)
    names = [(name, p.requires_grad) for name, p in trained.named_parameters()]
    with LiveTensors() as live:
        frozen, difference, effect = check_saved(
            trained, tmp_path, BaseState(digests, load_no_base), probe()
        )
    assert frozen == len(digests)
    assert difference == 0
    assert effect > 0
    base = sum(p.nbytes for p in trained.get_base_model().parameters() if not p.requires_grad)
    assert live.peak < base / 2
    assert [(name, p.requires_grad) for name, p in trained.named_parameters()] == names
    assert trained.active_adapters == ["default"]


def test_another_adapter_than_the_one_that_was_trained_is_seen(tmp_path: Path) -> None:
    trained, digests = saved(tmp_path)
    with torch.no_grad():
        next(p for n, p in trained.named_parameters() if "lora_B" in n).add_(1.0)
    with pytest.raises(RunError, match="differs from the trained one: its logits differ by"):
        check_saved(trained, tmp_path, BaseState(digests, load_no_base), probe())


def test_a_kind_of_which_a_model_has_one_is_put_onto_a_fresh_base(tmp_path: Path) -> None:
    """PEFT takes a second LoRA with biases beside none."""
    trained, digests = saved(tmp_path, bias="lora_only")
    loaded = []

    def load() -> Any:
        loaded.append(tiny_models.build("llama", intermediate_size=4096))
        return loaded[-1]

    _, difference, _ = check_saved(trained, tmp_path, BaseState(digests, load), probe())
    assert difference < 1e-5
    assert len(loaded) == 1
    assert list(trained.peft_config) == ["default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("size", [1, 7, 8, 100_001])
def test_a_digest_tells_one_bit_of_a_tensor(
    dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.randint(0, 255, (size + 3,)).to(dtype)
    tensor = whole[3:].clone()
    found = hash_tensor(tensor)
    assert hash_tensor(whole[3:]) == found, "wherever it stands in memory"
    assert hash_tensor(tensor.view(1, -1)) != found
    monkeypatch.setattr("ftlevel.training.model._CPU_CHUNK", 17)
    assert hash_tensor(tensor) == found, "in whatever pieces"
    if size > 1:
        assert hash_tensor(tensor.flip(0)) != found
    for at in {0, size // 2, size - 1}:
        bits = tensor.clone()
        bits.view(torch.uint8)[at * bits.itemsize] ^= 1
        assert hash_tensor(bits) != found
