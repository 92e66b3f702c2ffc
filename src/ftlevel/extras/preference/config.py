"""Preference settings: loss and reference model of `--task preference` and `--task reward`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ftlevel.config.constraints import NoEffect, list_violations
from ftlevel.config.gate import Check, GateConfig, OnData, OnRow
from ftlevel.config.section import TEXT_FIELDS, TaskSection, list_unread
from ftlevel.errors import join_names

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
CONSTRAINTS = (
    NoEffect(
        "train.label_smoothing_factor",
        f"preference.loss!={'|'.join(SMOOTHED)}",
        f"it is for {join_names(SMOOTHED)}",
    ),
)
SMOOTHING = 0.1
"""Default fraction of swapped pairs that `cdpo` and `robust` assume."""


class PreferenceConfig(TaskSection):
    """Settings of preference training and of reward models."""

    tasks: ClassVar[tuple[str, ...]] = ("preference", "reward")
    summary: ClassVar[str] = "Preference loss."
    shorthand: ClassVar[str] = "loss"
    uses: ClassVar[Mapping[str, tuple[str, ...]]] = {"preference": TEXT_FIELDS}
    paths: ClassVar[Mapping[str, str]] = {"reference": "--reference"}
    pipeline_tags: ClassVar[Mapping[str, str]] = {
        "preference": "text-generation",
        "reward": "text-classification",
    }

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
        yield from list_violations(config, CONSTRAINTS)
        loss, smoothing = self.loss or DEFAULT_LOSS, config.train.label_smoothing_factor
        parameters = {name: facts.parameters for name, facts in LOSSES.items()}
        yield from list_unread("preference", self.changed, loss, parameters)
        if loss == "robust" and smoothing >= 0.5:
            yield (
                f"--label-smoothing-factor {smoothing:g}: --loss robust divides by 1 - 2 times it. "
                "Give less than 0.5."
            )

    @classmethod
    def complete_run(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Returns `raw`; of these tasks, with its loss filled in and `task` made to match it."""
        task = str(raw.get("task", "")).replace("_", "-")
        section = raw.get("preference") or {}
        if task not in cls.tasks or not isinstance(section, dict):
            return raw
        loss = section.get("loss") or ("reward" if task == "reward" else DEFAULT_LOSS)
        task = "reward" if loss == "reward" else "preference"
        return {**raw, "task": task, "preference": {**section, "loss": loss}}

    @classmethod
    def map_path(cls, field: str, value: str, function: Callable[[str], str]) -> str:
        """Returns the reference, with `function` applied if it names a model."""
        return value if value in (START, NO_REFERENCE) else function(value)


class PreferenceChecks(GateConfig):
    """Action per problem of preference data."""

    equal_answers: Annotated[
        OnRow,
        Check("a pair of equal answers", "Pairs without a difference teach nothing: remove them"),
    ] = Field("drop", description="Pair whose chosen and rejected answers are equal.")
    contradicting_pairs: Annotated[
        OnRow, Check("an earlier pair with the answers swapped", "Keep the right one")
    ] = Field("warn", description="Pair equal to an earlier one with the answers swapped.")
    scores_disagree: Annotated[
        OnData,
        Check(
            "pairs whose rejected answer has the same score or a better one",
            "Check whether chosen and rejected are swapped",
        ),
    ] = Field(
        "warn", description="Pairs whose rejected answer scores at least as high as the chosen one."
    )
    length_bias: Annotated[
        OnData,
        Check(
            "length alone predicts the preferred answer",
            "The model may learn length: balance the pairs, or use --loss simpo or dpo-norm",
        ),
    ] = Field(
        "warn",
        description="Pairs in which length alone predicts the chosen answer in 80 % or more.",
    )
    prompt_in_answer: Annotated[
        OnData,
        Check("answers that begin with their prompt", "Check whether the prompt leaked"),
    ] = Field("warn", description="Pairs with an answer that begins with the whole last question.")
    one_verdict: Annotated[
        OnData, Check("all answers have the same label", "Add answers of the other kind")
    ] = Field("stop", description="Judged answers that are all desirable, or all undesirable.")
