"""Positions that virtual tokens leave for texts to predict."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ftlevel.config import SPECS
from ftlevel.data.encoding.row import Encoded
from ftlevel.evaluation.answers import InferenceModel
from ftlevel.tasks import TASKS
from ftlevel.trained.generation import GenerationOptions
from tiny_tokenizers import build_tokenizer
from virtual_tokens import adapt


@pytest.mark.parametrize(
    ("method", "length"), [("prompt", 492), ("p-tuning", 492), ("prefix", 512)]
)
def test_texts_are_truncated_to_what_virtual_tokens_leave(method, length):
    trained: Any = SimpleNamespace(
        model=adapt(SPECS[method](), "bert", "seqcls"),
        tokenizer=build_tokenizer("bert"),
        kind="encoder",
        task=TASKS["text-classification"],
        ref=SimpleNamespace(
            labels=["a", "b", "c"],
            options={},
            prompt_format=None,
            card=SimpleNamespace(method=method, max_length=0),
        ),
    )
    model = InferenceModel(trained, GenerationOptions(1), None, truncate=True)
    (row,) = model.fit_rows([Encoded([5] * 600, 0, 0)])
    assert len(row.input_ids) == length
