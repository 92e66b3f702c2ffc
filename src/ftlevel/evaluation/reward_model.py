"""A reward model of `--task reward` as a reward of `--task rl`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ftlevel.config.rl import unknown_reward
from ftlevel.data.formats.turns import Message
from ftlevel.errors import InputError
from ftlevel.evaluation.answers import InferenceModel, inference_context, predict_rows
from ftlevel.evaluation.scoring import GenerationOptions
from ftlevel.tasks.base import OutputOptions
from ftlevel.tasks.preferences.formats import LabeledAnswer
from ftlevel.tasks.rl.rewards import Prompt
from ftlevel.trained.load import LoadedModel, fingerprint_of, load_ref
from ftlevel.trained.model_ref import PLAIN, ModelRef, resolve_model

REWARD_TASK = "reward"


@dataclass
class TrainedRewardModel:
    """A run, adapter or model that scores answers; weights load on the first call.

    Attributes:
        fingerprint: hash of all weights.
    """

    found: ModelRef
    device: str
    fingerprint: str
    _loaded: LoadedModel | None = field(default=None, repr=False)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Return the score of each completion; NaN for one that the model cannot read."""
        if self._loaded is None:
            self._loaded = load_ref(self.found, self.device)
        trained = self._loaded
        questions = [
            LabeledAnswer(_turns(prompt), (Message("assistant", text),), True, row)
            for row, (prompt, text) in enumerate(zip(prompts, completions, strict=True))
        ]
        model = InferenceModel(trained, GenerationOptions(0), None, cuts=True)
        with inference_context(model, trained):
            replies = predict_rows(model, questions, OutputOptions()).replies
        return [math.nan if reply is None else float(reply.columns[""]) for reply in replies]


def open_reward_model(name: str, device: str) -> TrainedRewardModel:
    """Resolve the reward model `name` without loading weights.

    Raises:
        InputError: it does not exist, or was trained for another task.
    """
    said = f"--reward {name}"
    try:
        found = resolve_model(name, device=device, said=said)
    except InputError as error:
        if "/" in name or "no such directory" not in str(error):
            raise
        raise InputError(unknown_reward(name)) from None
    if found.card.method == PLAIN and found.card.task == "text-classification":
        found = resolve_model(name, REWARD_TASK, device=device, said=said)
    if found.card.task != REWARD_TASK:
        raise InputError(
            f"{said} was trained for {found.card.task}, and a reward model has one score. Name a "
            "run of --task reward."
        )
    return TrainedRewardModel(found, device, fingerprint_of(found))


def _turns(prompt: Prompt) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    return tuple(_message(turn) for turn in prompt)


def _message(turn: dict[str, Any]) -> Message:
    extra = {name: value for name, value in turn.items() if name not in ("role", "content")}
    return Message(turn["role"], turn["content"], extra)
