"""Tests of stop texts in text that transformers' `generate` writes."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny_models
from ftlevel.commands.generate import _CallbackStreamer
from ftlevel.trained.generation import GenerationOptions, generate_texts


class Letters:
    """A tokenizer whose tokens are the letters from a on; it records how many it decodes."""

    pad_token_id, eos_token_id = 0, 0

    def __init__(self) -> None:
        self.decoded: list[int] = []

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        self.decoded.append(len(ids))
        return "".join(chr(97 + int(i)) for i in ids)


class Rows:
    """Token ids, of which it records how many are copied."""

    device = "cpu"

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids, self.copied = ids, 0

    def __getitem__(self, key: Any) -> torch.Tensor:
        chosen = self.ids[key]
        self.copied = chosen.numel()
        return chosen


def test_stop_criteria_read_only_new_tokens_that_may_end_in_a_stop_text():
    class Model:
        generation_config = type("Config", (), {"eos_token_id": None})()

    options = GenerationOptions(200, stop_texts=("bc",))
    criteria = options.arguments(Model(), Letters())["stopping_criteria"][0]
    prompt = [0, 1, 2]  # has the stop text
    rows = torch.tensor([prompt] * 2)
    for step in range(100):
        new = torch.tensor([[1], [2 if step == 99 else 1]])
        rows = torch.cat([rows, new], 1)
        seen = Rows(rows)
        assert criteria(seen, None).tolist() == [False, step == 99]
        assert seen.copied <= 2 * 6


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_beams_of_generation_config_are_not_used(temperature):
    model = tiny_models.build("bart")
    options = GenerationOptions(6, temperature=temperature)
    texts = []
    for beams in (1, 4):  # of the checkpoint
        model.generation_config.num_beams = beams
        texts.append(generate_texts(model, Letters(), [[5, 6, 7], [8, 9]], "cpu", 2, options))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["  One ", "two E", "NE", "ND three"], ["One ", "two ", "EN"]),
        (["one E", "N"], ["one ", "EN"]),  # it ends before the stop text is complete
        (["one END two"], ["one "]),
        (["END"], []),
    ],
)
def test_streamed_text_ends_before_stop_text(pieces, shown):
    received: list[str] = []
    task = SimpleNamespace(stop_texts=("END", "\n\n"))
    trained: Any = SimpleNamespace(tokenizer=Letters(), kind="decoder", task=task)
    streamer = _CallbackStreamer(trained, received.append)
    for number, piece in enumerate(pieces):
        streamer.on_finalized_text(piece, stream_end=number == len(pieces) - 1)
    assert received == shown
