"""Rewards of completions: reward models, and evaluation by sampled completions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ftlevel.config.rl import RlConfig, unknown_reward
from ftlevel.data.formats.turns import Message
from ftlevel.errors import InputError
from ftlevel.evaluation.answers import InferenceModel, predict_rows
from ftlevel.evaluation.intervals import ExampleRecord, select_metrics
from ftlevel.evaluation.rollouts import Group, Rollouts, score_rows
from ftlevel.evaluation.scoring import Evaluator
from ftlevel.task import PolicyObjective
from ftlevel.tasks.base import OutputOptions
from ftlevel.tasks.preferences.formats import LabeledAnswer
from ftlevel.tasks.rl.formats import ANSWER
from ftlevel.tasks.rl.rewards import Prompt, Rewards
from ftlevel.tasks.rl.rows import TokenLogps
from ftlevel.trained.generation import GenerationOptions
from ftlevel.trained.model_ref import PLAIN, LoadedModel, ModelRef
from ftlevel.trained.reference import compute_fingerprint, resolve_reference
from ftlevel.trained.resolve import resolve_model

HELD_OUT = 1 << 40
"""Step of the random numbers of evaluations, which are the same before and after training."""


_TAIL = 8  # tokens


def open_rewards(
    settings: RlConfig,
    device: str,
    tokenizer: Any,
    rows: Sequence[Any],
    where: Callable[[int], str],
) -> Rewards:
    """Open the rewards of `settings` for the prompts `rows`; loads no weights.

    `where` returns the place of a row of the table.

    Raises:
        ConfigError: a reward does not exist, or the rows lack a column or an answer for it.
    """
    end = str(tokenizer.decode(rows[0].input_ids[-_TAIL:])).rstrip()
    rewards = Rewards.resolve(
        settings, partial(open_reward_model, device=device), opens_think=end.endswith("<think>")
    )
    rewards.check_columns(rows[0].columns)
    answers = [row.columns.get(ANSWER) for row in rows]
    rewards.check_answers(answers, lambda at: where(rows[at].row))
    return rewards


def open_teacher(
    name: str, objective: PolicyObjective, kind: str, tokenizer: Any, device: str, dtype: str
) -> TokenLogps:
    """Open a function that scores completions with the model `name`, which is loaded.

    `kind` and `tokenizer` are those of the model that samples.

    Raises:
        InputError: the teacher does not exist, or has another tokenizer.
    """
    reference = resolve_reference("--teacher", name, kind, tokenizer, device)
    model = reference.ref.load(device, dtype).model
    return partial(
        score_rows, model, objective, pad_id=tokenizer.pad_token_id, device=device, dtype=dtype
    )


@dataclass(frozen=True)
class RewardEvaluator(Evaluator):
    """Evaluator that samples `generated_rows` prompts of `rows`, a group for each.

    Attributes:
        rollouts: samples and scores with the evaluated model.
    """

    rollouts: Rollouts | None = None

    def __call__(
        self,
        model: Any,  # noqa: ARG002 - the rollouts have it
        record: ExampleRecord | None = None,
    ) -> dict[str, float]:
        """Return the metrics of the rollouts' model."""
        record = record or self.begin_record()
        if self.rollouts is None or not isinstance(self.objective, PolicyObjective):
            raise TypeError("rewards need rollouts")
        meter = self.objective.meter()
        for group in self.rollouts(HELD_OUT, list(self._generated_prompts())):
            values: Any = values_of(group)
            meter.update(values, group.texts, [group.row])  # type: ignore[arg-type]
            if record is not None:
                record.add_samples(group.row, values, group.texts)
        return select_metrics(meter.compute(float("nan")), self.metrics)

    def _generated_prompts(self) -> Any:
        return self.rows[: self.generated_rows]


def values_of(group: Group) -> np.ndarray:
    """Return (completions, 3 + functions): reward, length, whether it ended, and the scores."""
    lengths = [len(completion.ids) for completion in group.completions]
    ended = [completion.ended for completion in group.completions]
    return np.column_stack([group.rewards, lengths, ended, group.scores])


REWARD_TASK = "reward"


@dataclass
class TrainedRewardModel:
    """A run, adapter or model that scores answers; weights load on the first call.

    Attributes:
        fingerprint: hash of all weights.
    """

    ref: ModelRef
    device: str
    fingerprint: str
    _loaded: LoadedModel | None = field(default=None, repr=False)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Return the score of each completion; NaN for one that the model cannot read."""
        if self._loaded is None:
            self._loaded = self.ref.load(self.device)
        questions = [
            LabeledAnswer(_turns(prompt), (Message("assistant", text),), True, row)
            for row, (prompt, text) in enumerate(zip(prompts, completions, strict=True))
        ]
        model = InferenceModel(self._loaded, GenerationOptions(0), None, cuts=True)
        with model.inference():
            replies = predict_rows(model, questions, OutputOptions()).replies
        return [math.nan if reply is None else float(reply.columns[""]) for reply in replies]


def open_reward_model(name: str, device: str) -> TrainedRewardModel:
    """Resolve the reward model `name` without loading weights.

    Raises:
        InputError: it does not exist, or was trained for another task.
    """
    said = f"--reward {name}"
    try:
        ref = resolve_model(name, device=device, said=said)
    except InputError as error:
        if "/" in name or "no such directory" not in str(error):
            raise
        raise InputError(unknown_reward(name)) from None
    if ref.card.method == PLAIN and ref.card.task == "text-classification":
        ref = resolve_model(name, REWARD_TASK, device=device, said=said)
    if ref.card.task != REWARD_TASK:
        raise InputError(
            f"{said} was trained for {ref.card.task}, and a reward model has one score. Name a "
            "run of --task reward."
        )
    return TrainedRewardModel(ref, device, compute_fingerprint(ref))


def _turns(prompt: Prompt) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    return tuple(_message(turn) for turn in prompt)


def _message(turn: dict[str, Any]) -> Message:
    extra = {name: value for name, value in turn.items() if name not in ("role", "content")}
    return Message(turn["role"], turn["content"], extra)
