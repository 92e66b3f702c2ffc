"""What `ftlevel export` is told: the run or model, the format, and the file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from ftlevel.config.sections import Positive, Section


class ExportConfig(Section):
    """Everything that decides an export."""

    model: str = Field(
        min_length=1,
        description="Run, adapter or model: a Hub id, a local directory, or builtin:NAME. An "
        "adapter is merged into its base first.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    format: Literal["gguf"] = Field(
        "gguf", description="gguf, the format of llama.cpp, Ollama and LM Studio."
    )
    outtype: Literal["auto", "f32", "f16", "bf16", "q8_0"] = Field(
        "auto",
        description="Type of the matrices; q8_0 is 8 bits in blocks of 32. auto keeps the model's "
        "own. Vectors and norms stay in float32.",
    )
    out: Path = Field(description="File to write, FILE.gguf; FILE.Modelfile comes beside it.")
    overwrite: bool = Field(False, description="Replace these files where they exist.")
    verify: bool = Field(
        True,
        description="Read the file back and compare its logits and its tokens with the model's.",
    )
    verify_tokens: Positive = Field(512, description="How many tokens of text are compared.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Where the models are compared."
    )

    @field_validator("out")
    @classmethod
    def _is_named_gguf(cls, value: Path) -> Path:
        if value.suffix != ".gguf":
            raise ValueError(
                f"{value} does not end in .gguf, by which programs know the format. "
                f"Name it {value.with_suffix('.gguf')}"
            )
        return value

    @property
    def modelfile(self) -> Path:
        """Where the Modelfile goes."""
        return self.out.with_suffix(".Modelfile")
