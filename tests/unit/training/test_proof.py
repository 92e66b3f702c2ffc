"""Tests that the checks after a run have bounded cost and detect changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny_models
from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.data.encoding.row import Encoded
from ftlevel.errors import FtlevelError, RunError
from ftlevel.tasks.classes import Classes
from ftlevel.tasks.losses import Tokens
from ftlevel.training import sharding
from ftlevel.training.model import TensorHash, hash_tensor, hash_tensors
from ftlevel.training.processes import Processes
from ftlevel.training.proof import (
    MAX_TEST_LOGITS,
    NUM_TEST_ROWS,
    CheckInputs,
    check_saved,
    collate_check_batch,
    compare_frozen,
)
from live_tensors import LiveTensors

VOCABULARY = 100_000
MAX_LENGTH = MAX_TEST_LOGITS // VOCABULARY // NUM_TEST_ROWS


def create_rows(length: int) -> list[Encoded]:
    return [Encoded(list(range(length)), list(range(length)), i) for i in range(9)]


@pytest.mark.parametrize("length", [10, 5000])
def test_check_batch_length_is_bounded_by_vocabulary(length):
    objective = Tokens("perplexity", shifted=True)
    batch = collate_check_batch(create_rows(length), 0, "cpu", objective, VOCABULARY)
    shape = (NUM_TEST_ROWS, min(length, MAX_LENGTH))
    assert batch["input_ids"].shape == batch["labels"].shape == shape


def test_encoder_input_is_not_truncated_with_labels():
    objective = Tokens("perplexity", feeds_labels=True)
    batch = collate_check_batch(create_rows(5000), 0, "cpu", objective, VOCABULARY)
    assert batch["input_ids"].shape == (NUM_TEST_ROWS, 5000)
    assert batch["labels"].shape == (NUM_TEST_ROWS, MAX_LENGTH)


def test_classification_row_is_not_truncated():
    texts = [Encoded([1] * 5000, 2, i) for i in range(2)]
    batch = collate_check_batch(texts, 0, "cpu", Classes("accuracy"), VOCABULARY)
    assert batch["input_ids"].shape == (2, 5000)


def test_cast_frozen_weight_counts_as_unchanged():
    """Switch Transformers keeps its router in float32, whatever dtype it is loaded in."""
    trained = tiny_models.build("llama").bfloat16().requires_grad_(False)
    digests = hash_tensors(trained.named_parameters())
    count = compare_frozen(trained, digests)
    trained.model.norm.float()
    assert compare_frozen(trained, digests) == count
    trained.model.norm.weight[0] += 1e-3
    with pytest.raises(RunError, match=r"1 frozen tensors changed while training: model\.norm"):
        compare_frozen(trained, digests)


def save_trained_adapter(tmp_path: Path, **settings: Any) -> tuple[Any, Mapping[str, TensorHash]]:
    """Return a trained model whose adapter is saved in `tmp_path`, and the base's digests."""
    base = tiny_models.build("llama", intermediate_size=4096)
    digests = hash_tensors(base.named_parameters())
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, **settings)
    trained = get_peft_model(base, config)
    trained.save_pretrained(tmp_path)
    return trained, digests


def create_check_inputs() -> CheckInputs:
    return CheckInputs(tiny_models.build_batch("llama"), Tokens("perplexity", shifted=True), "cpu",
                 "float32")  # fmt: skip


def raise_if_loaded() -> Any:
    raise AssertionError("the base was loaded a second time")


def test_check_saved_does_not_load_base_again(tmp_path):
    trained, digests = save_trained_adapter(tmp_path)
    names = [(name, p.requires_grad) for name, p in trained.named_parameters()]
    with LiveTensors() as live:
        frozen, difference, effect = check_saved(
            trained, tmp_path, digests, raise_if_loaded, create_check_inputs()
        )
    assert frozen == len(digests)
    assert difference == 0
    assert effect > 0
    base = sum(p.nbytes for p in trained.get_base_model().parameters() if not p.requires_grad)
    assert live.peak < base / 2
    assert [(name, p.requires_grad) for name, p in trained.named_parameters()] == names
    assert trained.active_adapters == ["default"]


def test_saved_adapter_that_differs_raises(tmp_path):
    trained, digests = save_trained_adapter(tmp_path)
    with torch.no_grad():
        next(p for n, p in trained.named_parameters() if "lora_B" in n).add_(1.0)
    with pytest.raises(RunError, match="differs from the trained one: its logits differ by"):
        check_saved(trained, tmp_path, digests, raise_if_loaded, create_check_inputs())


def test_lora_with_bias_is_checked_on_fresh_base(tmp_path):
    """PEFT does not support a second LoRA with trained biases in one model."""
    trained, digests = save_trained_adapter(tmp_path, bias="lora_only")
    bases = []

    def load():
        bases.append(tiny_models.build("llama", intermediate_size=4096))
        return bases[-1]

    _, difference, _ = check_saved(trained, tmp_path, digests, load, create_check_inputs())
    assert difference < 1e-5
    assert len(bases) == 1
    assert list(trained.peft_config) == ["default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("size", [1, 7, 8, 100_001])
def test_digest_changes_with_every_bit(dtype, size, monkeypatch):
    storage = torch.randint(0, 255, (size + 3,)).to(dtype)
    tensor = storage[3:].clone()
    digest = hash_tensor(tensor)
    assert hash_tensor(storage[3:]) == digest, "wherever it stands in memory"
    assert hash_tensor(tensor.view(1, -1)) != digest
    monkeypatch.setattr("ftlevel.training.model._CPU_CHUNK", 17)
    assert hash_tensor(tensor) == digest, "in whatever pieces"
    if size > 1:
        assert hash_tensor(tensor.flip(0)) != digest
    for index in {0, size // 2, size - 1}:
        bits = tensor.clone()
        bits.view(torch.uint8)[index * bits.itemsize] ^= 1
        assert hash_tensor(bits) != digest


def test_missing_files_of_a_sharded_run_end_all_processes(tmp_path, monkeypatch):
    """A process that does not see the files must not leave the others waiting for it."""
    shared = list[FtlevelError]()

    class OneOfSeveral(Processes):
        def in_all(self, make: Callable[[], Any]) -> Any:
            try:
                return make()
            except FtlevelError as error:
                shared.append(error)
                raise

    inputs = SimpleNamespace(logits=lambda _: torch.zeros(1))
    monkeypatch.setattr(sharding, "create_check_inputs", lambda _: inputs)
    monkeypatch.setattr(sharding, "compare_frozen", lambda *_: 0)
    model, run = MagicMock(), RunDirectory(tmp_path)
    with pytest.raises(FtlevelError) as caught:
        sharding.verify_sharded_run(
            model, model, run, model, OneOfSeveral(), initial_logits=torch.zeros(1)
        )
    assert shared == [caught.value]
