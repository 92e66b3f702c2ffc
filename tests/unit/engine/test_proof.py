"""What is compared after a run does not grow with the rows."""

from __future__ import annotations

import pytest

from ftlevel.data.encode import Encoded
from ftlevel.engine.proof import PROBE_ROWS, PROBE_SCORES, probe_batch
from ftlevel.tasks.objectives import Classes, Tokens

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
