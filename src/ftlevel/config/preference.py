"""How preferences are learned: the loss, what it is told, and what each loss reads of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from ftlevel.config.section import Section
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
