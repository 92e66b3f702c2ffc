"""Ask a trained model what its task is: one adapter or several, with the base beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ftlevel.config import GenerateConfig, build_section
from ftlevel.errors import ConfigError
from ftlevel.evaluation.answers import Ask, answer
from ftlevel.evaluation.scoring import Writing
from ftlevel.models.hardware import autocast
from ftlevel.models.loading import quiet_libraries
from ftlevel.tasks.base import Reply
from ftlevel.trained.adapter_set import BASE, AdapterSet, load_adapter_set


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt.

    Attributes:
        prompt: as given.
        text: what the trained model says, in words.
        base: the same from the base model; None if it was not asked.
        scores: class or word → probability; empty where there are none.
        tags: each word with its tag; empty but for token classification.
        adapter: which adapter said it.
    """

    prompt: str
    text: str
    base: str | None
    scores: dict[str, float]
    tags: list[tuple[str, str]]
    adapter: str


def generate(
    name: str | None, prompts: Sequence[str], **settings: Any
) -> tuple[list[Answer], list[str]]:
    """Let the run, adapter or model `name` answer `prompts`.

    Args:
        name: a run directory, an adapter directory, or a model; None with `adapters` or
            `adapters_dir`.
        prompts: one or more; the run's own prompt format is put around each.
        settings: fields of `GenerateConfig`.

    Returns:
        An answer for each prompt and adapter, in order, and notes for the user.

    Raises:
        InputError: something cannot be loaded.
        ConfigError: `compare_base` where there is no adapter to switch off; no context for a
            question; no mask to fill in.
    """
    return answer_all(build_section(GenerateConfig, {"name": name, **settings}), prompts)


def answer_all(config: GenerateConfig, prompts: Sequence[str]) -> tuple[list[Answer], list[str]]:
    """Load what `config` names and let it answer; see `generate`."""
    with quiet_libraries():
        adapters = load_adapter_set(config)
        if config.compare_base and not adapters.has_base:
            raise ConfigError(
                f"--compare-base: {config.name} has no adapter that could be switched off. "
                "Ask the base model by itself: ftlevel generate MODEL --prompt …"
            )
        ask = Ask(prompts, config.context, writing_of(config), config.batch_size)
        replies = {name: ask_voice(adapters, name, ask) for name in adapters.voices}
        base = ask_voice(adapters, BASE, ask) if config.compare_base else None
    return list(_answers(prompts, replies, base)), adapters.notes


def writing_of(config: GenerateConfig) -> Writing:
    """Return how text is generated."""
    return Writing(config.max_new_tokens, config.temperature, config.top_p, config.seed)


def ask_voice(adapters: AdapterSet, name: str, ask: Ask) -> list[Reply]:
    """Return what the adapter called `name`, or the base, says to each prompt."""
    with (
        adapters.speaking(name) as trained,
        torch.no_grad(),
        autocast(trained.device, trained.dtype),
    ):
        return answer(trained, ask)


def _answers(
    prompts: Sequence[str], replies: dict[str, list[Reply]], base: list[Reply] | None
) -> Iterator[Answer]:
    for index, prompt in enumerate(prompts):
        for name, said in replies.items():
            reply = said[index]
            beside = base[index].text if base else None
            yield Answer(prompt, reply.text, beside, reply.scores, reply.tags, name)
