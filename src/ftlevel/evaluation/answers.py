"""How a model of any task answers prompts: the task says what to ask, this says how it is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import Encoded
from ftlevel.errors import ConfigError, InputError
from ftlevel.evaluation.scoring import Writing, batches, generate_texts
from ftlevel.models.kinds import max_positions
from ftlevel.tasks.base import Reply
from ftlevel.trained.load import Trained


@dataclass(frozen=True)
class Ask:
    """What is asked.

    Attributes:
        prompts: one or more.
        context: where answers are looked for; question answering only.
        writing: how text is generated.
        batch_size: prompts a forward pass.
    """

    prompts: Sequence[str]
    context: str | None
    writing: Writing
    batch_size: int = 8


def answer(trained: Trained, ask: Ask) -> list[Reply]:
    """Return what `trained` says to each prompt; call it without gradients.

    Raises:
        ConfigError: a context that is missing or not wanted, or a prompt without a mask.
        InputError: a prompt beyond the model's positions.
    """
    task = trained.task
    if task.wants_context and ask.context is None:
        raise ConfigError(f"{task.name} looks for an answer in a text. Add --context TEXT.")
    if ask.context is not None and not task.wants_context:
        raise ConfigError(f"--context belongs to question answering, and this is {task.name}.")
    return task.answer(_PromptedModel(trained, ask), ask.prompts, ask.context)


class _PromptedModel:
    """A loaded model as its task asks it.

    Args:
        trained: the model.
        ask: how it is asked.
    """

    def __init__(self, trained: Trained, ask: Ask) -> None:
        self._trained, self._ask = trained, ask
        self.tokenizer = trained.tokenizer
        self.kind = trained.kind
        self.labels: Sequence[str] = trained.labels
        self.options = trained.options
        self.max_length = trained.max_length
        self.prompt_format = trained.prompt_format

    def write(self, prompts: Sequence[list[int]]) -> list[str]:
        """Return the text that it writes after each prompt."""
        trained, ask = self._trained, self._ask
        return generate_texts(
            trained.model, trained.tokenizer, prompts, trained.device, ask.batch_size, ask.writing
        )

    def score(self, rows: Sequence[Encoded]) -> Iterator[torch.Tensor]:
        """Yield the logits of each row, without padding, in order."""
        trained = self._trained
        positions = max_positions(trained.model.config)
        longest = max(len(row.input_ids) for row in rows)
        if positions is not None and longest > positions:
            raise InputError(f"--prompt has {longest:,} tokens, and the model takes {positions:,}.")
        collate = Collator(trained.tokenizer.pad_token_id or 0)
        for part in batches(rows, self._ask.batch_size):
            batch: dict[str, Any] = {k: v.to(trained.device) for k, v in collate(part).items()}
            inputs, _ = trained.objective.split(batch)
            logits = trained.objective.logits(trained.model(**inputs))
            for row, scores in zip(part, logits, strict=True):
                yield scores if trained.objective.per_row else scores[: len(row.input_ids)]
