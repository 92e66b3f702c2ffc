"""What `ftlevel check-served` is told: what was exported, and the server to hold to it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ftlevel.config.sections import Positive, Section


class CheckServedConfig(Section):
    """Everything that decides a check of a server."""

    out: Path = Field(description="What ftlevel export wrote; its served.json holds the answers.")
    url: str | None = Field(
        None,
        description="Address of a running server with OpenAI's API, as http://127.0.0.1:8000. "
        "Nothing else is asked.",
    )
    model: str | None = Field(
        None,
        min_length=1,
        description="What the server calls the model; the default is the adapter's name, if the "
        "server lists it.",
    )
    inside: Literal["vllm", "llama.cpp", "mlx", "openvino"] | None = Field(
        None,
        description="Load it in this library instead, in float32, in a process of its own: vllm, "
        "llama.cpp (by xllamacpp), mlx or openvino (OpenVINO GenAI).",
    )
    python: Path | None = Field(
        None, description="The Python that has the library of --in; the default is this one."
    )
    timeout: Positive = Field(
        60, description="Seconds that a request may take; with --in ten times that for all."
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        description="How far a logprob may be from the recorded one: by default 0.02 in float32, "
        "0.1 in 16 bits.",
    )

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError(f"{value} is no address. Expected one such as http://127.0.0.1:8000")
        return value

    @model_validator(mode="after")
    def _asks_one(self) -> CheckServedConfig:
        if (self.url is None) == (self.inside is None):
            raise ValueError(
                "--url or --in: give one of them, the address of a running server or the library "
                "to load it in"
            )
        if self.python is not None and self.inside is None:
            raise ValueError("--python is of --in, and a server at --url has its own. Drop it")
        return self
