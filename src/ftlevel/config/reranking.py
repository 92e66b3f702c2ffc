"""Settings of rerankers: the loss, and the weight of relevant documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ftlevel.config.embedding import normalize_loss_name
from ftlevel.config.section import TaskSection
from ftlevel.errors import has_no_effect, join_names

RERANKING_TASKS = ("reranking",)
RerankingLossName = Literal["bce", "lce", "listnet", "ranknet", "lambda", "margin-mse", "mse"]


@dataclass(frozen=True)
class RerankingLoss:
    """Properties of a reranking loss.

    Attributes:
        is_listwise: whether a query needs several documents, not all with the same label.
        reads_teacher: whether the loss can use a teacher's scores instead of labels.
        is_bounded: whether labels have to be from 0 to 1.
        is_binary: whether a query needs a document with a label above 0, and one without.
    """

    is_listwise: bool = True
    needs_teacher: bool = False
    reads_teacher: bool = False
    is_bounded: bool = False
    is_binary: bool = False


LOSSES: dict[str, RerankingLoss] = {
    "bce": RerankingLoss(is_listwise=False, is_bounded=True),
    "lce": RerankingLoss(is_binary=True),
    "listnet": RerankingLoss(),
    "ranknet": RerankingLoss(),
    "lambda": RerankingLoss(),
    "margin-mse": RerankingLoss(needs_teacher=True, reads_teacher=True, is_binary=True),
    "mse": RerankingLoss(is_listwise=False, reads_teacher=True),
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
"""Other tools' loss name, in lower case without dashes and underscores → ftlevel's name."""


class RerankingConfig(TaskSection):
    """Settings of rerankers: the loss and its parameters."""

    tasks: ClassVar[tuple[str, ...]] = RERANKING_TASKS
    pipeline_tags: ClassVar[Mapping[str, str]] = {"reranking": "text-ranking"}
    shorthand: ClassVar[str] = "loss"

    loss: (
        Annotated[
            RerankingLossName, BeforeValidator(partial(normalize_loss_name, aliases=_ALIASES))
        ]
        | None
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

    def get_options(self, config: Any) -> dict[str, Any]:
        """Returns the settings of the loss, with the teacher."""
        return {**self.model_dump(), "teacher": config.distillation.teacher}

    def validate_run(self, config: Any) -> Iterator[str]:
        """Yields an error message for a `--teacher` that the loss does not read."""
        return validate_reranking(self, config.distillation.teacher)


def validate_reranking(config: RerankingConfig, teacher: str | None) -> Iterator[str]:
    """Yields an error message for a `--teacher` that the loss does not read."""
    if teacher is not None and config.loss and not LOSSES[config.loss].reads_teacher:
        losses = join_names(name for name, facts in LOSSES.items() if facts.reads_teacher)
        yield has_no_effect("--teacher", f"--loss {config.loss}", f"it is for {losses}")
