"""How text is written: the likeliest token every time, drawn, or the likeliest of several beams.

Where a run is written, and who else is told of it.

Where on the Hugging Face Hub a command's result goes.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ftlevel.config.section import NewDirectory, Section
from ftlevel.errors import ConfigError

Beams = Annotated[int, Field(ge=1, le=64)]
Temperature = Annotated[float, Field(ge=0, le=10)]
TopP = Annotated[float, Field(gt=0, le=1)]

NUM_BEAMS = "Beams that are searched for the likeliest text; 1 takes the likeliest token"
TEMPERATURE = "Temperature at which tokens are drawn; 0 takes the most likely one every time"
TOP_P = "Draw from the fewest tokens with this probability together"


class Decoding(Section):
    """What a run's own evaluation, and `generate`, write by."""

    num_beams: Beams = Field(1, description=f"{NUM_BEAMS}.")
    temperature: Temperature = Field(0.0, description=f"{TEMPERATURE}.")
    top_p: TopP = Field(1.0, description=f"{TOP_P}.")

    @model_validator(mode="after")
    def _one_way_to_write(self) -> Decoding:
        check_decoding(self.num_beams, self.temperature, self.top_p)
        return self


class DecodingAsInTraining(Section):
    """The same where what is not given is as in training."""

    num_beams: Beams | None = Field(None, description=f"{NUM_BEAMS}; default as in training.")
    temperature: Temperature | None = Field(
        None, description=f"{TEMPERATURE}; default as in training."
    )
    top_p: TopP | None = Field(None, description=f"{TOP_P}; default as in training.")

    @model_validator(mode="after")
    def _one_way_to_write(self) -> DecodingAsInTraining:
        check_decoding(self.num_beams or 1, self.temperature or 0.0, 1.0)
        return self

    def decoding(self, trained: Decoding) -> dict[str, Any]:
        """Return how is written; one way that is given is not mixed with another of training.

        Raises:
            ConfigError: they do not go together.
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
            check_decoding(beams, temperature, top_p)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return {"num_beams": beams, "temperature": temperature, "top_p": top_p}


def check_decoding(num_beams: int, temperature: float, top_p: float) -> None:
    """Refuse two ways to write at once.

    Raises:
        ValueError: beams and draws, or a share of draws that are none.
    """
    if num_beams > 1 and temperature > 0:
        raise ValueError(
            f"--num-beams {num_beams} looks for the likeliest text, and --temperature "
            f"{temperature:g} draws one. Give one of them."
        )
    if top_p < 1 and not temperature:
        raise ValueError(
            f"--top-p {top_p:g} is of draws, and nothing is drawn. Add --temperature 1, or drop it."
        )


def _split_trackers(value: Any) -> Any:
    """Read `wandb,tensorboard` as two, `none` as no tracker."""
    if isinstance(value, str):
        value = [name for name in re.split(r"[\s,]+", value.strip().lower()) if name]
    if isinstance(value, list | tuple):
        if "all" in value:
            raise ValueError("all is whatever is installed. Name the trackers: wandb,tensorboard")
        if value == ["none"]:
            return ()
        return tuple(dict.fromkeys(value))
    return value


Trackers = Annotated[
    tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...],
    BeforeValidator(_split_trackers),
]


class OutputConfig(Section):
    """Where the run is written."""

    dir: NewDirectory | None = Field(
        None, description="Run directory; the default is a new one under runs/."
    )
    overwrite: bool = Field(False, description="Replace a run directory that exists.")
    resume: bool = Field(
        False, description="Go on from the newest whole checkpoint of the run directory."
    )
    allow_change: tuple[str, ...] = Field(
        (),
        description="A field that may be another than when the run began, by the name that "
        "--resume gives it; the change is kept in summary.json. Repeatable.",
    )
    run_name: str | None = Field(
        None,
        pattern=r"^[^/\\]+$",
        description="What the run is called: its directory under runs/ without an output "
        "directory, and its name in the experiment trackers.",
    )
    report_to: Trackers = Field(
        (),
        description="Experiment trackers that are sent the metrics, with commas between: "
        "tensorboard, wandb, mlflow, trackio; none is the default. Files are under the run.",
    )
    tracker_project: str | None = Field(
        None,
        min_length=1,
        description="Project (mlflow: experiment) of the run in those trackers; the default is "
        "that of their environment variable, else ftlevel.",
    )
    push_to_hub: str | None = Field(
        None,
        min_length=1,
        description="Upload what was trained, with its card, to this repository of the Hugging "
        "Face Hub when the run is done and proved.",
    )
    hub_private: bool = Field(False, description="Make that repository a private one.")


class HubSection(Section):
    """What a command that writes a model is told of the Hub."""

    push_to_hub: str | None = Field(
        None,
        min_length=1,
        description="Upload what was written, with its card, to this repository of the Hugging "
        "Face Hub once it is checked.",
    )
    hub_private: bool = Field(False, description="Make that repository a private one.")

    @model_validator(mode="after")
    def _a_private_repository_has_a_name(self) -> HubSection:
        if self.hub_private and self.push_to_hub is None:
            raise ValueError(
                "--hub-private is of --push-to-hub. Add --push-to-hub NAME, or drop it."
            )
        return self
