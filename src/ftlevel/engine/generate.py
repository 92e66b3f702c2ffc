"""Ask a trained model: text for a prompt, or a class for a text, with the base beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ftlevel.data.prompts import prompt_ids
from ftlevel.engine.evaluation import generate_texts
from ftlevel.engine.trained import Trained, load_trained
from ftlevel.errors import ConfigError
from ftlevel.models.hardware import autocast
from ftlevel.models.loading import quiet_libraries

_BATCH = 8


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt.

    Attributes:
        prompt: as given.
        text: what the trained model wrote, or its most likely class.
        base: the same from the base model; None if it was not asked.
        scores: class → probability; empty for text.
    """

    prompt: str
    text: str
    base: str | None
    scores: dict[str, float]


def generate(
    name: str,
    prompts: Sequence[str],
    *,
    compare_base: bool = False,
    max_new_tokens: int = 128,
    device: str = "auto",
) -> tuple[list[Answer], list[str]]:
    """Let the run, adapter or model `name` answer `prompts`, greedily.

    Args:
        name: a run directory, an adapter directory, or a model.
        prompts: one or more; the run's own prompt format is put around each.
        compare_base: ask the base model too, by switching the adapter off.
        max_new_tokens: longest answer in tokens.
        device: auto, cpu, cuda or mps.

    Returns:
        The answers in order, and notes for the user.

    Raises:
        InputError: `name` cannot be loaded.
        ConfigError: `compare_base` where there is no adapter to switch off.
    """
    with quiet_libraries():
        trained = load_trained(name, device)
        if compare_base and not trained.has_adapter:
            raise ConfigError(
                f"--compare-base: {name} has no adapter that could be switched off. "
                "Ask the base model by itself: ftlevel generate MODEL --prompt …"
            )
        answer = _classify if trained.labels else _write
        with torch.no_grad(), autocast(trained.device, trained.dtype):
            texts = answer(trained, prompts, max_new_tokens)
            with _without_adapter(trained) if compare_base else contextlib.nullcontext():
                base = answer(trained, prompts, max_new_tokens) if compare_base else None
    answers = [
        Answer(prompt, text, base[i][0] if base else None, scores)
        for i, (prompt, (text, scores)) in enumerate(zip(prompts, texts, strict=True))
    ]
    return answers, trained.notes


def _without_adapter(trained: Trained) -> Any:
    return trained.model.disable_adapter()


def _write(
    trained: Trained, prompts: Sequence[str], max_new_tokens: int
) -> list[tuple[str, dict[str, float]]]:
    if trained.prompt_format is None:
        raise TypeError("a model without classes has a prompt format")
    ids = [prompt_ids(trained.tokenizer, trained.prompt_format, prompt) for prompt in prompts]
    texts = generate_texts(
        trained.model, trained.tokenizer, ids, trained.device, _BATCH, max_new_tokens
    )
    return [(text, {}) for text in texts]


def _classify(
    trained: Trained,
    prompts: Sequence[str],
    max_new_tokens: int,  # noqa: ARG001 - as `_write`
) -> list[tuple[str, dict[str, float]]]:
    batch = trained.tokenizer(list(prompts), return_tensors="pt", padding=True)
    inputs = {name: value.to(trained.device) for name, value in batch.items()}
    probabilities = trained.model(**inputs).logits.float().softmax(-1).tolist()
    answers = []
    for row in probabilities:
        scores = dict(zip(trained.labels, row, strict=True))
        answers.append((max(scores, key=lambda label: scores[label]), scores))
    return answers
