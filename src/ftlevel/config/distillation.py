"""Distillation settings, and pydantic types for lists and mappings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ftlevel.config.constraints import Constraints, Excludes, Needs, NoEffect
from ftlevel.config.section import Positive, Section


def split_pairs(value: Any) -> Any:
    """Parse `a=1,b=2` as a mapping; return any other value unchanged."""
    if not isinstance(value, str) or "=" not in value:
        return value
    pairs: dict[str, str] = {}
    for pair in filter(None, map(str.strip, value.split(","))):
        name, _, text = (part.strip() for part in pair.rpartition("="))
        if not (name and text):
            raise ValueError(f"{pair!r} is not NAME=VALUE; separate several by commas")
        pairs[name] = text
    return pairs


Scalar = bool | int | float | str


def _parse_scalars(value: Any) -> Any:
    if not isinstance(value := split_pairs(value), dict):
        return value
    return {name: _scalar(v) if isinstance(v, str) else v for name, v in value.items()}


def _scalar(text: str) -> Scalar:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


Scalars = Annotated[dict[str, Scalar], BeforeValidator(_parse_scalars)]
"""Arguments of an optimizer or schedule, under their names in the library."""


def _split_names(value: Any) -> Any:
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return value


def _parse_tokens(value: Any) -> Any:
    """Parse `12,<tool>` as [12, "<tool>"]; tokens that contain commas must be given as a list."""
    names = _split_names(value)
    if isinstance(value, str):
        return [int(name) if name.isdecimal() else name for name in names]
    return names


Names = Annotated[list[str], BeforeValidator(_split_names)]
FewNames = Annotated[tuple[str, ...], BeforeValidator(_split_names)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)] | str], BeforeValidator(_parse_tokens)]


def _parse_weights(value: Any) -> Any:
    value = split_pairs(value)
    if value is None or value == "balanced":
        return value
    if not isinstance(value, dict) or not value:
        raise ValueError("expected balanced, or NAME=WEIGHT,NAME=WEIGHT")
    for name, weight in value.items():
        if isinstance(weight, bool) or not _is_positive(weight):
            raise ValueError(f"the weight of {name!r} is {weight}; a number above 0 is expected")
    return {str(name): float(weight) for name, weight in value.items()}


def _is_positive(weight: Any) -> bool:
    try:
        return 0 < float(weight) < math.inf
    except (TypeError, ValueError):
        return False


ClassWeights = Annotated[
    Literal["balanced"] | dict[str, float] | None,
    BeforeValidator(_parse_weights),
    Field(
        description="Class or tag weights in the training loss: balanced, or NAME=WEIGHT,…. "
        "Classes that are not named have weight 1."
    ),
]


DISTILLATION_TASKS = ("text-generation", "summarization", "translation")
Divergence = Literal["forward-kl", "reverse-kl", "jsd"]


_SCORED_TASKS = ("embedding", "reranking")
"""Tasks whose teacher scores documents."""


class DistillationConfig(Section):
    """Token-level distillation from a teacher model."""

    teacher: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Teacher model for distillation: a run, adapter or model with the same "
        "tokenizer; for embedding and reranking, any embedding model or reranker.",
    )
    divergence: Divergence = Field(
        "forward-kl",
        description="Divergence to minimize. forward-kl: KL(teacher, model); reverse-kl: "
        "KL(model, teacher); jsd: generalized Jensen–Shannon divergence.",
    )
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Weight of the teacher in the mixture distribution of jsd."
    )
    kd_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5,
        description="Weight of the divergence in the loss; cross-entropy has weight 1 - kd_ratio.",
    )
    kd_temperature: Annotated[float, Field(ge=0.01, le=100)] = Field(
        1.0,
        description="Temperature for the logits of teacher and model. The divergence is "
        "multiplied by its square.",
    )
    kd_top_k: Positive | Literal["all"] = Field(
        64,
        description="Number of top teacher tokens stored per position; the rest of the "
        "probability mass is stored as one value. all stores the whole vocabulary.",
    )


_KD_FIELDS = [name for name in DistillationConfig.model_fields if name != "teacher"]
_WITH_TEACHER = "distillation.teacher!=None"


def list_unused_fields(tasks: str, reason: str) -> list[NoEffect]:
    """Returns that only `--teacher` has an effect with `tasks`, such as `A|B`, for `reason`."""
    return [
        NoEffect(f"distillation.{name}", f"task={tasks}", reason, when=_WITH_TEACHER)
        for name in _KD_FIELDS
    ]


def list_distillation_rules(learners: Sequence[str]) -> Constraints:
    """Returns the constraints of distillation.

    `learners` are the tasks of extensions that use the teacher in their own way.
    """
    tasks = (*DISTILLATION_TASKS, *learners, *_SCORED_TASKS)
    return (
        *[Needs(f"distillation.{name}", "distillation.teacher MODEL") for name in _KD_FIELDS],
        *list_unused_fields("|".join(_SCORED_TASKS), "the model learns the scores of --teacher"),
        Excludes("distillation.teacher", f"task!={'|'.join(tasks)}",
             f"it is for {', '.join(tasks)}", "Drop it, or change the task."),
        NoEffect("distillation.jsd_beta", "distillation.divergence!=jsd", "it is for jsd",
             when=_WITH_TEACHER),
        Excludes("train.label_smoothing_factor", "distillation.teacher",
             "the teacher defines the target distribution"),
    )  # fmt: skip
