"""How text is written: the likeliest token every time, drawn, or the likeliest of several beams."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from ftlevel.config.section import Section
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
