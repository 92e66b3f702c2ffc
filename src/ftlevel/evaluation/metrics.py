"""Which metrics an evaluation gives: all of the task, or those that the user names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from ftlevel.errors import ConfigError, did_you_mean, listing
from ftlevel.task import Objective
from ftlevel.tasks.base import BaseTask

V = TypeVar("V")


def check_metrics(
    wish: Sequence[str], task: BaseTask, objective: Objective, *, generates: bool, how: str
) -> None:
    """Refuse names that no metric has.

    Args:
        wish: names of metrics; none for all.
        task: whose they are.
        objective: what the model is trained on.
        generates: whether texts are generated and scored.
        how: how they would be.

    Raises:
        ConfigError: naming those that there are.
    """
    known = ("loss", *objective.metrics, *(task.text_metrics if generates else ()))
    for name in wish:
        if name in known:
            continue
        if name in task.text_metrics:
            raise ConfigError(f"--metrics {name} is of generated texts. Add {how}.")
        raise ConfigError(
            f"--metrics: no metric of --task {task.name} is called {name!r}."
            f"{did_you_mean(name, known)} Metrics here: {listing(known, 20)}."
        )


def wants_texts(wish: Sequence[str], task: BaseTask) -> bool:
    """Whether one of the metrics that are wanted is of generated texts."""
    return not wish or bool(set(wish) & set(task.text_metrics))


def generates_texts(wish: bool | None, task: BaseTask) -> bool:
    """Whether texts are generated and scored: as the user says, or as the task does."""
    return task.generates if wish is None else wish and task.writes_text


def keep_wanted(found: Mapping[str, V], wish: Sequence[str]) -> dict[str, V]:
    """Return the loss, and of the other metrics those that are wanted; none named is all."""
    return {name: found[name] for name in found if not wish or name == "loss" or name in wish}
