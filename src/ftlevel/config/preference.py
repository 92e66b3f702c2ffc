"""Preference and distillation settings, and pydantic types for lists and mappings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ftlevel.config.constraints import Constraints, Excludes, Needs, NoEffect
from ftlevel.config.section import Positive, Section, TaskSection, list_unread

LossName = Literal[
    "dpo",
    "cdpo",
    "robust",
    "hinge",
    "ipo",
    "dpo-norm",
    "ld-dpo",
    "rpo",
    "simpo",
    "cpo",
    "orpo",
    "kto",
    "reward",
]
PREFERENCE_TASKS = ("preference", "reward")
START, NO_REFERENCE = "start", "none"
Weight = Annotated[float, Field(gt=0, le=1000)]


@dataclass(frozen=True)
class LossProperties:
    """Properties of a preference loss.

    Attributes:
        parameters: fields of `PreferenceConfig` that the loss uses, besides `loss`.
        paired: whether it needs a preferred and a rejected answer per prompt.
        smoothed: whether it uses `train.label_smoothing_factor`.
        rate: factor on the default learning rate. Papers use a tenth of the rate for supervised
            fine-tuning or less, except for orpo, which includes the supervised loss.
    """

    beta: float | None
    parameters: tuple[str, ...] = ("beta", "reference")
    needs_reference: bool = True
    paired: bool = True
    smoothed: bool = False
    rate: float = 0.1


LOSSES: dict[str, LossProperties] = {
    "dpo": LossProperties(0.1),
    "cdpo": LossProperties(0.1, smoothed=True),
    "robust": LossProperties(0.1, smoothed=True),
    "hinge": LossProperties(0.1),
    "ipo": LossProperties(0.1, ("beta", "reference", "ipo_ratios")),
    "dpo-norm": LossProperties(5.0),
    "ld-dpo": LossProperties(0.1, ("beta", "reference", "ld_alpha")),
    "rpo": LossProperties(0.1, ("beta", "reference", "sft_weight", "nll_mean")),
    "simpo": LossProperties(2.0, ("beta", "simpo_gamma"), needs_reference=False),
    "cpo": LossProperties(0.1, ("beta", "sft_weight", "nll_mean"), needs_reference=False),
    "orpo": LossProperties(0.1, ("beta",), needs_reference=False, rate=1.0),
    "kto": LossProperties(
        0.1, ("beta", "reference", "desirable_weight", "undesirable_weight"), paired=False
    ),
    "reward": LossProperties(None, ("center",), needs_reference=False, rate=1.0),
}
SMOOTHED = [name for name, facts in LOSSES.items() if facts.smoothed]
DEFAULT_LOSS = "dpo"
SMOOTHING = 0.1
"""Default fraction of swapped pairs that `cdpo` and `robust` assume."""


class PreferenceConfig(TaskSection):
    """Settings of preference training and of reward models."""

    tasks: ClassVar[tuple[str, ...]] = PREFERENCE_TASKS
    shorthand: ClassVar[str] = "loss"
    paths: ClassVar[Mapping[str, str]] = {"reference": "--reference"}

    loss: LossName | None = Field(
        None, description="Preference loss; default: dpo. reward trains a reward model."
    )
    beta: Weight | None = Field(
        None,
        description="Beta of the loss; default: 0.1 (2 for simpo, 5 for dpo-norm). It scales "
        "the log-probability difference; for orpo, it weights the odds-ratio term.",
    )
    simpo_gamma: Annotated[float, Field(ge=0, le=1000)] | None = Field(
        None, description="Target margin of simpo; default: half of beta."
    )
    sft_weight: Annotated[float, Field(gt=0, le=1000)] = Field(
        1.0, description="Weight of the supervised loss of the chosen answer in rpo and cpo."
    )
    nll_mean: Literal["answer", "token"] = Field(
        "answer",
        description="Reduction of the supervised loss in rpo and cpo: mean over answers, or over "
        "tokens as in TRL. Evaluation averages over answers.",
    )
    ld_alpha: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="Weight of the tokens beyond the shorter answer's length in ld-dpo."
    )
    ipo_ratios: Literal["mean", "sum"] = Field(
        "mean",
        description="Reduction of log-ratios in ipo: mean per token, or sum per answer. The "
        "authors' code uses the mean, their paper the sum.",
    )
    desirable_weight: Weight = Field(1.0, description="Weight of desirable answers in kto.")
    undesirable_weight: Weight = Field(1.0, description="Weight of undesirable answers in kto.")
    center: Annotated[float, Field(ge=0, le=100)] = Field(
        0.0,
        description="Weight of a penalty on the squared sum of a pair's rewards, which centers "
        "them at 0.",
    )
    reference: Annotated[str, Field(min_length=1)] = Field(
        START,
        description="Reference model: start (the initial model), none, or a run, adapter or model"
        " with the same tokenizer.",
    )

    @property
    def loss_properties(self) -> LossProperties:
        """Properties of the configured loss, by default dpo."""
        return LOSSES[self.loss or DEFAULT_LOSS]

    @property
    def uses_reference(self) -> bool:
        """Whether log-probabilities of a reference model are needed."""
        return self.loss_properties.needs_reference and self.reference != NO_REFERENCE

    @property
    def other_reference(self) -> str | None:
        """Reference model; None if it is the initial model, or none is needed."""
        is_other = self.uses_reference and self.reference != START
        return self.reference if is_other else None

    @property
    def effective_beta(self) -> float:
        """`beta`, or the default of the loss if it is unset."""
        return self.beta if self.beta is not None else (self.loss_properties.beta or 0.0)

    @property
    def margin(self) -> float:
        """Target reward margin (gamma) of simpo: the setting, or half of beta."""
        return self.effective_beta / 2 if self.simpo_gamma is None else self.simpo_gamma

    def get_options(self, config: Any) -> dict[str, Any]:
        """Returns the settings of the loss, with label smoothing."""
        return {**self.model_dump(), "smoothing": config.train.label_smoothing_factor}

    def get_rate_factor(self, method: str, kind: str, size: float) -> tuple[float, str]:
        """Returns the factor of the loss on the default learning rate."""
        return self.loss_properties.rate, "as in the DPO papers"

    def validate_run(self, config: Any) -> Iterator[str]:
        """Yields an error message for each value that has no effect or contradicts another."""
        return validate_preference(self, config.train.label_smoothing_factor)


def validate_preference(config: PreferenceConfig, smoothing: float) -> Iterator[str]:
    """Yields an error message for each value that has no effect or contradicts another."""
    loss = config.loss or DEFAULT_LOSS
    parameters = {name: facts.parameters for name, facts in LOSSES.items()}
    yield from list_unread("preference", config.changed, loss, parameters)
    if loss == "robust" and smoothing >= 0.5:
        yield (
            f"--label-smoothing-factor {smoothing:g}: --loss robust divides by 1 - 2 times it. "
            "Give less than 0.5."
        )


def normalize_loss(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns `raw`; of a preference task, with its loss filled in and `task` made to match it."""
    task = str(raw.get("task", "")).replace("_", "-")
    section = raw.get("preference") or {}
    if task not in PREFERENCE_TASKS or not isinstance(section, dict):
        return raw
    usual = "reward" if task == "reward" else DEFAULT_LOSS
    loss = section.get("loss") or usual
    task = "reward" if loss == "reward" else "preference"
    return {**raw, "task": task, "preference": {**section, "loss": loss}}


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
    tasks = (*DISTILLATION_TASKS, *learners)
    return (
        *[Needs(f"distillation.{name}", "distillation.teacher MODEL") for name in _KD_FIELDS],
        Excludes("distillation.teacher", f"task!={'|'.join(tasks)}",
             f"it is for {', '.join(tasks)}", "Drop it, or change the task."),
        NoEffect("distillation.jsd_beta", "distillation.divergence!=jsd", "it is for jsd",
             when=_WITH_TEACHER),
        Excludes("train.label_smoothing_factor", "distillation.teacher",
             "the teacher defines the target distribution"),
    )  # fmt: skip
