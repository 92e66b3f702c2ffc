"""Configuration of decoding, of the run directory, and of uploads to the Hub."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from ftlevel.config.constraints import Constraints, Needs
from ftlevel.config.section import NewDirectory, Positive, Section
from ftlevel.errors import ConfigError, excludes, needs

Beams = Annotated[int, Field(ge=1, le=64)]
Temperature = Annotated[float, Field(ge=0, le=10)]
TopP = Annotated[float, Field(gt=0, le=1)]

NUM_BEAMS = "Number of beams; 1 disables beam search"
TEMPERATURE = "Sampling temperature; 0 is greedy decoding"
TOP_P = "Cumulative probability of the tokens for nucleus sampling"


class Decoding(Section):
    """Decoding settings of `generate` and of evaluation during training."""

    num_beams: Beams = Field(1, description=f"{NUM_BEAMS}.")
    temperature: Temperature = Field(0.0, description=f"{TEMPERATURE}.")
    top_p: TopP = Field(1.0, description=f"{TOP_P}.")

    @model_validator(mode="after")
    def _validate_decoding(self) -> Decoding:
        validate_decoding(self.num_beams, self.temperature, self.top_p)
        return self


class DecodingAsInTraining(Section):
    """Decoding settings; None uses the setting of the training run."""

    num_beams: Beams | None = Field(None, description=f"{NUM_BEAMS}; default: as in training.")
    temperature: Temperature | None = Field(
        None, description=f"{TEMPERATURE}; default: as in training."
    )
    top_p: TopP | None = Field(None, description=f"{TOP_P}; default: as in training.")
    max_new_tokens: Positive | None = Field(
        None, description="Maximum number of generated tokens; default: as in training."
    )

    @model_validator(mode="after")
    def _validate_decoding(self) -> DecodingAsInTraining:
        validate_decoding(self.num_beams or 1, self.temperature or 0.0, 1.0)
        return self

    def unused_decoding(self, reason: str) -> list[str]:
        """Returns "FLAG has no effect: REASON" per setting that is not None; [] without reason."""
        names = (n for n in DecodingAsInTraining.model_fields if getattr(self, n) is not None)
        flags = [f"--{name.replace('_', '-')}" for name in names if reason]
        return [f"{flag} has no effect: {reason}" for flag in flags]

    def decoding(self, trained: Decoding) -> dict[str, Any]:
        """Returns arguments for `generate`: these settings, or where None, those of training.

        `num_beams` above 1 overrides training's sampling, `temperature` above 0 its beam search.
        Raises ConfigError if these settings contradict each other.
        """
        beams, temperature = self.num_beams, self.temperature
        if beams is None:
            beams = 1 if temperature else trained.num_beams
        if temperature is None:
            temperature = 0.0 if beams > 1 else trained.temperature
        top_p = self.top_p
        if top_p is None:
            top_p = trained.top_p if temperature else 1.0
        try:
            validate_decoding(beams, temperature, top_p)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return {"num_beams": beams, "temperature": temperature, "top_p": top_p}


def validate_decoding(num_beams: int, temperature: float, top_p: float) -> None:
    """Raise ValueError for beam search with sampling, or top-p without sampling."""
    if num_beams > 1 and temperature > 0:
        beams, other = f"--num-beams {num_beams}", f"--temperature {temperature:g}"
        raise ValueError(excludes(beams, other, "one searches for the likeliest text, one samples"))
    if top_p < 1 and not temperature:
        raise ValueError(needs(f"--top-p {top_p:g}", "--temperature 1", "it samples"))


def _split_trackers(value: Any) -> Any:
    if isinstance(value, str):
        value = [name for name in re.split(r"[\s,]+", value.strip().lower()) if name]
    if isinstance(value, list | tuple):
        if "all" in value:
            raise ValueError(
                "all would use every installed tracker. Name the trackers: wandb,tensorboard"
            )
        if list(value) == ["none"]:
            return ()
        return tuple(dict.fromkeys(value))
    return value


Trackers = Annotated[
    tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...],
    BeforeValidator(_split_trackers),
]


class OutputConfig(Section):
    """Run directory, trackers and upload of a run."""

    constraints: ClassVar[Constraints] = (Needs("hub_private", "push_to_hub NAME"),)
    dir: NewDirectory | None = Field(
        None, description="Run directory; default: a new one under runs/."
    )
    overwrite: bool = Field(False, description="Whether to replace an existing run directory.")
    resume: bool = Field(False, description="Whether to resume at the newest complete checkpoint.")
    allow_change: tuple[str, ...] = Field(
        (),
        description="Field that may change on --resume, named as in the error message. Changes "
        "are recorded in summary.json. Repeatable.",
    )
    run_name: str | None = Field(
        None,
        pattern=r"^[^/\\]+$",
        description="Name of the run: directory under runs/, and name in the trackers.",
    )
    report_to: Trackers = Field(
        (),
        description="Experiment trackers: tensorboard, wandb, mlflow, trackio; default: none. "
        "Comma-separated; their files are stored in the run directory.",
    )
    tracker_project: str | None = Field(
        None,
        min_length=1,
        description="Tracker project (mlflow: experiment). Default: the tracker's environment "
        "variable, else ftlevel.",
    )
    push_to_hub: str | None = Field(
        None,
        min_length=1,
        description="Hub repository to upload the trained model and its card to. Uploaded when "
        "the run is complete and verified.",
    )
    hub_private: bool = Field(False, description="Whether to create a private Hub repository.")


class HubSection(Section):
    """Base class of configurations whose command can upload the written model to the Hub."""

    constraints: ClassVar[Constraints] = (Needs("hub_private", "push_to_hub NAME"),)
    push_to_hub: str | None = Field(
        None,
        min_length=1,
        description="Hub repository to upload the result and its card to. Uploaded once it is "
        "verified.",
    )
    hub_private: bool = Field(False, description="Whether to create a private Hub repository.")
