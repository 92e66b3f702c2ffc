"""Ask a trained model what its task is, with the base beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ftlevel.engine.answers import Ask, answer
from ftlevel.engine.trained import Trained, load_trained
from ftlevel.errors import ConfigError
from ftlevel.models.hardware import autocast
from ftlevel.models.loading import quiet_libraries


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt.

    Attributes:
        prompt: as given.
        text: what the trained model says, in words.
        base: the same from the base model; None if it was not asked.
        scores: class or word → probability; empty where there are none.
        tags: each word with its tag; empty but for token classification.
    """

    prompt: str
    text: str
    base: str | None
    scores: dict[str, float]
    tags: list[tuple[str, str]]


def generate(
    name: str,
    prompts: Sequence[str],
    *,
    context: str | None = None,
    compare_base: bool = False,
    max_new_tokens: int = 128,
    device: str = "auto",
) -> tuple[list[Answer], list[str]]:
    """Let the run, adapter or model `name` answer `prompts`, greedily.

    Args:
        name: a run directory, an adapter directory, or a model.
        prompts: one or more; the run's own prompt format is put around each.
        context: the text in which question answering looks for answers.
        compare_base: ask the base model too, by switching the adapter off.
        max_new_tokens: longest answer in tokens.
        device: auto, cpu, cuda or mps.

    Returns:
        The answers in order, and notes for the user.

    Raises:
        InputError: `name` cannot be loaded.
        ConfigError: `compare_base` where there is no adapter to switch off; no context for a
            question; no mask to fill in.
    """
    with quiet_libraries():
        trained = load_trained(name, device)
        if compare_base and not trained.has_adapter:
            raise ConfigError(
                f"--compare-base: {name} has no adapter that could be switched off. "
                "Ask the base model by itself: ftlevel generate MODEL --prompt …"
            )
        ask = Ask(prompts, context, max_new_tokens)
        with torch.no_grad(), autocast(trained.device, trained.dtype):
            replies = answer(trained, ask)
            with _without_adapter(trained) if compare_base else contextlib.nullcontext():
                base = answer(trained, ask) if compare_base else None
    answers = [
        Answer(prompt, reply.text, base[i].text if base else None, reply.scores, reply.tags)
        for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
    ]
    return answers, trained.notes


def _without_adapter(trained: Trained) -> Any:
    return trained.model.disable_adapter()
