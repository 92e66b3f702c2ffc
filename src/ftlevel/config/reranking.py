"""Settings of rerankers: the loss, and the weight of relevant documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ftlevel.config.embedding import list_given, read_loss
from ftlevel.config.section import Section
from ftlevel.errors import join_names

RERANKING_TASKS = ("reranking",)
RerankingLossName = Literal["bce", "lce", "listnet", "ranknet", "lambda", "margin-mse", "mse"]


@dataclass(frozen=True)
class RerankingLoss:
    """Properties of a reranking loss.

    Attributes:
        listed: whether a query needs several documents, not all with the same label.
        taught: whether the loss needs a teacher's scores.
        reads_teacher: whether the loss can use a teacher's scores instead of labels.
        bounded: whether labels have to be from 0 to 1.
    """

    listed: bool = True
    taught: bool = False
    reads_teacher: bool = False
    bounded: bool = False


LOSSES: dict[str, RerankingLoss] = {
    "bce": RerankingLoss(listed=False, bounded=True),
    "lce": RerankingLoss(),
    "listnet": RerankingLoss(),
    "ranknet": RerankingLoss(),
    "lambda": RerankingLoss(),
    "margin-mse": RerankingLoss(taught=True, reads_teacher=True),
    "mse": RerankingLoss(listed=False, reads_teacher=True),
}
_ALIASES = {
    "binarycrossentropyloss": "bce",
    "binarycrossentropy": "bce",
    "listwise": "lce",
    "localizedcontrastive": "lce",
    "listnetloss": "listnet",
    "ranknetloss": "ranknet",
    "lambdaloss": "lambda",
    "marginmseloss": "margin-mse",
    "mseloss": "mse",
}
"""Lowercase names of other tools, without dashes and underscores."""


class RerankingConfig(Section):
    """Reranking loss and its settings."""

    loss: (
        Annotated[RerankingLossName, BeforeValidator(partial(read_loss, aliases=_ALIASES))] | None
    ) = Field(
        None,
        description="Reranking loss; default: lce for several documents per query, bce for one; "
        "margin-mse and mse with a teacher.",
    )
    pos_weight: Annotated[float, Field(gt=0, le=10_000)] | None = Field(
        None,
        description="Weight of relevant documents in bce; default: number of irrelevant "
        "documents per relevant one.",
    )


def find_reranking_problems(
    task: str, settings: RerankingConfig, teacher: str | None
) -> Sequence[str]:
    """Returns an error message for a reranking setting or `--teacher` without effect."""
    values = list_given(settings)
    if task not in RERANKING_TASKS:
        names = join_names(f"--{name.replace('_', '-')}" for name in values)
        return [f"{names}: of --task reranking, and --task is {task}. Drop it."] if values else []
    if teacher is not None and settings.loss and not LOSSES[settings.loss].reads_teacher:
        readers = join_names(name for name, facts in LOSSES.items() if facts.reads_teacher)
        return [
            f"--teacher: --loss {settings.loss} does not read it; {readers} do. Drop one of them."
        ]
    if settings.pos_weight is not None and teacher is not None:
        return [
            "--pos-weight: --teacher trains by margin-mse or mse, which do not read it. Drop it."
        ]
    if settings.pos_weight is not None and settings.loss not in (None, "bce"):
        return [f"--pos-weight: --loss {settings.loss} does not read it; bce does. Drop it."]
    return []
