"""Configuration of `ftlevel check-served`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ftlevel.config.section import Address, Positive, Section


class CheckServedConfig(Section):
    """Configuration of `ftlevel check-served`."""

    out: Path = Field(
        description="Output of ftlevel export; its served.json has the reference answers."
    )
    url: Address | None = Field(
        None,
        description="URL of an OpenAI-compatible server, e.g. http://127.0.0.1:8000. No other "
        "address is contacted.",
    )
    model: str | None = Field(
        None,
        min_length=1,
        description="Model name on the server; default: the adapter's name, if listed.",
    )
    inside: Literal["vllm", "llama.cpp", "mlx", "openvino"] | None = Field(
        None,
        description="Library to load the model in, instead of a server. vllm, llama.cpp "
        "(xllamacpp), mlx or openvino (OpenVINO GenAI), in float32 and in a separate process.",
    )
    python: Path | None = Field(
        None, description="Python interpreter with the library of --in; default: this one."
    )
    timeout: Positive = Field(
        60, description="Timeout per request in seconds; with --in, ten times that in total."
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        description="Maximum difference of a log-probability; default: 0.02 in float32, 0.1 in 16"
        " bits. For an embedding model, maximum of 1 - cosine similarity; default: "
        "0.001. For a reranker, maximum difference of scores.",
    )

    @model_validator(mode="after")
    def _validate_target(self) -> CheckServedConfig:
        if (self.url is None) == (self.inside is None):
            raise ValueError(
                "--url or --in: give exactly one of them: the address of a running server, or "
                "the library to load the model in"
            )
        if self.python is not None and self.inside is None:
            raise ValueError("--python applies to --in, not to a server at --url. Drop it")
        return self
