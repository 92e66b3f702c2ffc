"""How a model learns what another one expects, beside what the rows say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ftlevel.config.section import Positive, Section

TAUGHT_TASKS = ("text-generation", "summarization", "translation")
Divergence = Literal["forward-kl", "reverse-kl", "jsd"]


class DistillationConfig(Section):
    """Another model's predictions as a target, token by token."""

    teacher: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="A run, adapter or model with the same tokenizer, whose predictions of the "
        "answers' tokens are learned too.",
    )
    divergence: Divergence = Field(
        "forward-kl",
        description="Distance of the model from the teacher: KL(teacher, model), KL(model, "
        "teacher), or the generalized Jensen–Shannon divergence.",
    )
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Share of the teacher in the mixture that jsd compares both with."
    )
    kd_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="Share of the distance in the loss; the rest is the rows' cross entropy."
    )
    kd_temperature: Annotated[float, Field(ge=0.01, le=100)] = Field(
        1.0,
        description="Divides the scores of both before they are compared; the distance is "
        "multiplied by its square.",
    )
    kd_top_k: Positive | Literal["all"] = Field(
        64,
        description="How many of the teacher's likeliest tokens are kept at each place, with the "
        "probability of all others as one; all keeps the whole vocabulary.",
    )


_FLAGS = {"divergence": "--divergence", "kd_ratio": "--kd-ratio",
          "kd_temperature": "--kd-temperature", "kd_top_k": "--kd-top-k"}  # fmt: skip


def find_distillation_problems(
    task: str, settings: DistillationConfig, smoothing: float, *, streaming: bool
) -> Sequence[str]:
    """Return what is said of a teacher that nothing would read, or that cannot be had.

    Args:
        task: its name.
        settings: the section.
        smoothing: `train.label_smoothing_factor`.
        streaming: whether rows come as a stream.
    """
    plain, problems = DistillationConfig(), list[str]()

    def is_given(name: str) -> bool:
        value: Any = getattr(settings, name)
        return bool(value != getattr(plain, name))

    if settings.teacher is None:
        names = filter(is_given, DistillationConfig.model_fields)
        return [f"{_FLAGS.get(name, f'distillation.{name}')} is of a --teacher, and there is none. "
                "Add --teacher MODEL, or drop it." for name in names]  # fmt: skip
    if task not in TAUGHT_TASKS:
        problems.append(
            f"--teacher is of tasks that write text ({', '.join(TAUGHT_TASKS)}), and --task is "
            f"{task}. Drop it, or change the task."
        )
    if is_given("jsd_beta") and settings.divergence != "jsd":
        problems.append(
            f"distillation.jsd_beta: --divergence {settings.divergence} does not read it; jsd "
            "does. Drop it."
        )
    if smoothing:
        problems.append(
            f"--label-smoothing-factor {smoothing:g} spreads a target over all tokens alike, and "
            "--teacher says how. Drop one of them."
        )
    if streaming:
        problems.append(
            "--streaming: a --teacher is asked about all rows before the first step. Drop one of "
            "them."
        )
    return problems
