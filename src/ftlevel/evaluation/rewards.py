"""Evaluate a model by the rewards of completions that it samples for held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ftlevel.config.rl import RlConfig
from ftlevel.evaluation.intervals import select_metrics
from ftlevel.evaluation.reward_model import open_reward_model
from ftlevel.evaluation.rollouts import Group, Rollouts
from ftlevel.evaluation.scoring import EvaluationRecord, Evaluator
from ftlevel.task import PolicyObjective
from ftlevel.tasks.rl.formats import ANSWER
from ftlevel.tasks.rl.rewards import Rewards

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
    """Return the rewards of `settings` for the prompts `rows`; loads no weights.

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
        record: EvaluationRecord | None = None,
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
