"""What is compared after a run does not grow with the rows."""

from __future__ import annotations

import pytest

import tiny_models
from ftlevel.data.encoding.encode import Encoded
from ftlevel.errors import RunError
from ftlevel.tasks.classes import Classes
from ftlevel.tasks.tokens import Tokens
from ftlevel.training.proof import PROBE_ROWS, PROBE_SCORES, _compare_frozen, probe_batch

VOCABULARY = 100_000
MOST = PROBE_SCORES // VOCABULARY // PROBE_ROWS


def rows(length: int) -> list[Encoded]:
    return [Encoded(list(range(length)), list(range(length)), i) for i in range(9)]


@pytest.mark.parametrize("length", [10, 5000])
def test_the_scores_of_a_vocabulary_are_bounded(length: int) -> None:
    batch = probe_batch(rows(length), 0, "cpu", Tokens("perplexity", shifted=True), VOCABULARY)
    assert batch["input_ids"].shape == batch["labels"].shape == (PROBE_ROWS, min(length, MOST))


def test_an_encoder_reads_all_of_a_row_whose_answer_is_cut() -> None:
    objective = Tokens("perplexity", feeds_labels=True)
    batch = probe_batch(rows(5000), 0, "cpu", objective, VOCABULARY)
    assert batch["input_ids"].shape == (PROBE_ROWS, 5000)
    assert batch["labels"].shape == (PROBE_ROWS, MOST)


def test_a_class_is_of_the_whole_row() -> None:
    texts = [Encoded([1] * 5000, 2, i) for i in range(2)]
    batch = probe_batch(texts, 0, "cpu", Classes("accuracy"), VOCABULARY)
    assert batch["input_ids"].shape == (2, 5000)


def test_a_frozen_weight_that_was_only_cast_is_unchanged() -> None:
    """Switch Transformers holds its router in float32, whatever it was loaded in."""
    fresh, trained = (tiny_models.build("llama").bfloat16().requires_grad_(False) for _ in "ab")
    count = _compare_frozen(trained, fresh)
    trained.model.norm.float()
    assert _compare_frozen(trained, fresh) == count
    trained.model.norm.weight[0] += 1e-3
    with pytest.raises(RunError, match=r"1 frozen tensors changed while training: model\.norm"):
        _compare_frozen(trained, fresh)
