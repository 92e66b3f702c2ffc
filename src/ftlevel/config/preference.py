"""How preferences are learned: the loss, what it is told, and what each loss reads of that.

Fields that are given as NAME=VALUE,NAME=VALUE on the command line, as a mapping in a recipe.

How a model learns what another one expects, beside what the rows say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from ftlevel.config.section import Positive, Section
from ftlevel.errors import listing

LossName = Literal[
    "dpo", "cdpo", "robust", "hinge", "ipo", "dpo-norm", "ld-dpo", "rpo", "simpo", "cpo", "orpo",
    "kto", "reward",
]  # fmt: skip
PREFERENCE_TASKS = ("preference", "reward")
START, NO_REFERENCE = "start", "none"
Weight = Annotated[float, Field(gt=0, le=1000)]


@dataclass(frozen=True)
class LossFacts:
    """What a loss is told.

    Attributes:
        beta: its default; None where it has none.
        reads: fields of `PreferenceConfig` that it reads, beside `loss`.
        referenced: whether it compares with the model as it began.
        paired: whether it needs two answers to one prompt.
        smoothed: whether it reads `train.label_smoothing_factor`.
        rate: what the method's learning rate is multiplied by where the user gives none: the
            papers' rates are a tenth of those for answers alone and less, but for orpo, which
            learns these too.
    """

    beta: float | None
    reads: tuple[str, ...] = ("beta", "reference")
    referenced: bool = True
    paired: bool = True
    smoothed: bool = False
    rate: float = 0.1


LOSSES: dict[str, LossFacts] = {
    "dpo": LossFacts(0.1),
    "cdpo": LossFacts(0.1, smoothed=True),
    "robust": LossFacts(0.1, smoothed=True),
    "hinge": LossFacts(0.1),
    "ipo": LossFacts(0.1, ("beta", "reference", "ipo_ratios")),
    "dpo-norm": LossFacts(5.0),
    "ld-dpo": LossFacts(0.1, ("beta", "reference", "ld_alpha")),
    "rpo": LossFacts(0.1, ("beta", "reference", "sft_weight", "nll_mean")),
    "simpo": LossFacts(2.0, ("beta", "simpo_gamma"), referenced=False),
    "cpo": LossFacts(0.1, ("beta", "sft_weight", "nll_mean"), referenced=False),
    "orpo": LossFacts(0.1, ("beta",), referenced=False, rate=1.0),
    "kto": LossFacts(
        0.1, ("beta", "reference", "desirable_weight", "undesirable_weight"), paired=False
    ),
    "reward": LossFacts(None, ("center",), referenced=False, rate=1.0),
}
DEFAULT_LOSS = "dpo"
SMOOTHING = 0.1
"""Share of swapped pairs that `cdpo` and `robust` reckon with where nobody says another."""


class PreferenceConfig(Section):
    """Which loss is learned from judged answers, and what it is told."""

    loss: LossName | None = Field(
        None,
        description="What --task preference learns by; the default is dpo. With reward it trains a "
        "model that scores answers.",
    )
    beta: Weight | None = Field(
        None,
        description="How much a difference of log-probabilities counts; 0.1, but 2 for simpo and "
        "5 for dpo-norm. Of orpo it is the weight of the odds ratio.",
    )
    simpo_gamma: Annotated[float, Field(ge=0, le=1000)] | None = Field(
        None, description="Margin that simpo asks for; the default is half of beta."
    )
    sft_weight: Annotated[float, Field(gt=0, le=1000)] = Field(
        1.0, description="Weight of the preferred answer's own loss in rpo and cpo."
    )
    nll_mean: Literal["answer", "token"] = Field(
        "answer",
        description="Whether that loss is the mean over answers, or over all tokens of a step as "
        "in TRL; evaluation takes the mean over answers.",
    )
    ld_alpha: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="Weight in ld-dpo of the tokens by which an answer is the longer one."
    )
    ipo_ratios: Literal["mean", "sum"] = Field(
        "mean",
        description="Whether ipo compares log-ratios a token, as its authors do, or of whole "
        "answers, as their paper writes.",
    )
    desirable_weight: Weight = Field(1.0, description="Weight of a desirable answer in kto.")
    undesirable_weight: Weight = Field(1.0, description="Weight of an undesirable answer in kto.")
    center: Annotated[float, Field(ge=0, le=100)] = Field(
        0.0, description="Weight of the squared sum of a pair's scores, which keeps them around 0."
    )
    reference: Annotated[str, Field(min_length=1)] = Field(
        START,
        description="What a policy is compared with: start, the model as it begins; none; or a "
        "run, adapter or model with the same tokenizer.",
    )

    @property
    def facts(self) -> LossFacts:
        """What the loss is told."""
        return LOSSES[self.loss or DEFAULT_LOSS]

    @property
    def is_referenced(self) -> bool:
        """Whether log-probabilities of a reference are needed."""
        return self.facts.referenced and self.reference != NO_REFERENCE

    @property
    def other_reference(self) -> str | None:
        """The run, adapter or model that is the reference; None where it is not another."""
        is_other = self.is_referenced and self.reference != START
        return self.reference if is_other else None

    @property
    def strength(self) -> float:
        """Beta as it is used."""
        return self.beta if self.beta is not None else (self.facts.beta or 0.0)

    @property
    def margin(self) -> float:
        """Gamma of simpo as it is used."""
        return self.strength / 2 if self.simpo_gamma is None else self.simpo_gamma


_FLAGS = {
    "loss": "--loss",
    "beta": "--beta",
    "simpo_gamma": "--simpo-gamma",
    "sft_weight": "--sft-weight",
    "desirable_weight": "--desirable-weight",
    "undesirable_weight": "--undesirable-weight",
    "reference": "--reference",
}


def find_preference_problems(
    task: str, settings: PreferenceConfig, smoothing: float, *, streaming: bool
) -> list[str]:
    """Return what is said of preferences that nothing would read.

    Args:
        task: its name.
        settings: the section.
        smoothing: `train.label_smoothing_factor`.
        streaming: whether rows come as a stream.
    """
    plain = PreferenceConfig()
    given = [n for n in PreferenceConfig.model_fields if getattr(settings, n) != getattr(plain, n)]
    if task not in PREFERENCE_TASKS:
        if not given:
            return []
        names = listing(map(_flag, given))
        return [
            f"{names}: of --task preference, and --task is {task}. Drop it, or change the task."
        ]
    loss, problems = settings.loss or DEFAULT_LOSS, []
    for name in given:
        if name not in ("loss", *settings.facts.reads):
            readers = _readers(name)
            do = "does" if len(readers) == 1 else "do"
            problems.append(
                f"{_flag(name)}: --loss {loss} does not read it; {listing(readers)} {do}. Drop it."
            )
    if smoothing and not settings.facts.smoothed:
        problems.append(
            f"--label-smoothing {smoothing:g}: --loss {loss} does not read it; cdpo and "
            "robust do. Drop it."
        )
    if loss == "robust" and smoothing >= 0.5:
        problems.append(
            f"--label-smoothing {smoothing:g}: --loss robust divides by 1 - 2 times it. Give less "
            "than 0.5."
        )
    if streaming and settings.is_referenced:
        problems.append(
            f"--streaming: --loss {loss} needs the log-probabilities of all answers "
            "before the first step. Use --loss orpo, simpo or cpo, or drop --streaming."
        )
    return problems


def _flag(name: str) -> str:
    return _FLAGS.get(name, f"preference.{name}")


def _readers(name: str) -> Sequence[str]:
    return [loss for loss in get_args(LossName) if name in LOSSES[loss].reads]


def with_loss(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the raw configuration with the loss of its task, and the task of its loss.

    A model that scores answers has another head than one that writes them, and so is a task.
    """
    task = str(raw.get("task", "")).replace("_", "-")
    section = raw.get("preference") or {}
    if task not in PREFERENCE_TASKS or not isinstance(section, dict):
        return raw
    usual = "reward" if task == "reward" else DEFAULT_LOSS
    loss = section.get("loss") or usual
    task = "reward" if loss == "reward" else "preference"
    return {**raw, "task": task, "preference": {**section, "loss": loss}}


def split_pairs(value: Any) -> Any:
    """Read `a=1,b=2` as a mapping; what has no `=` stays as it is."""
    if not isinstance(value, str) or "=" not in value:
        return value
    found: dict[str, str] = {}
    for pair in filter(None, map(str.strip, value.split(","))):
        name, _, text = (part.strip() for part in pair.rpartition("="))
        if not (name and text):
            raise ValueError(f"{pair!r} is no NAME=VALUE; several stand with commas between")
        found[name] = text
    return found


Scalar = bool | int | float | str


def _read_scalars(value: Any) -> Any:
    """Read numbers and switches that are given as words."""
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


Scalars = Annotated[dict[str, Scalar], BeforeValidator(_read_scalars)]
"""Settings of something else, by its own names."""


def _read_names(value: Any) -> Any:
    """Read `a,b` as two names."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return value


def _read_tokens(value: Any) -> Any:
    """Read `12,<tool>` as an id and a token's text; texts with commas are given as a list."""
    names = _read_names(value)
    if isinstance(value, str):
        return [int(name) if name.isdecimal() else name for name in names]
    return names


Names = Annotated[list[str], BeforeValidator(_read_names)]
FewNames = Annotated[tuple[str, ...], BeforeValidator(_read_names)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)] | str], BeforeValidator(_read_tokens)]


def _read_weights(value: Any) -> Any:
    """Read weights of classes; what is no number above 0 is named with its class."""
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
    BeforeValidator(_read_weights),
    Field(
        description="How much each class or tag counts in training, where some are rare: "
        "balanced, or NAME=WEIGHT,NAME=WEIGHT, 1 for the others.",
    ),
]


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


_FLAGS_OF = {"divergence": "--divergence", "kd_ratio": "--kd-ratio",
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
        return [
            f"{_FLAGS_OF.get(name, f'distillation.{name}')} is of a --teacher, and there is none. "
            "Add --teacher MODEL, or drop it."
            for name in names
        ]
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
