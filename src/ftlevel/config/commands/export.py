"""What `ftlevel export` is told: the run or model, the format, and the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator

from ftlevel.config.sections import Positive, Section


@dataclass(frozen=True)
class ExportFormat:
    """Where a format is found, and what its files are called.

    Attributes:
        module: that writes it.
        suffix: of the file; empty for a format that is a directory.
        beside: suffixes of the files that come beside it.
        merges: whether an adapter is merged into its base first.
    """

    module: str
    suffix: str
    beside: tuple[str, ...] = ()
    merges: bool = True

    @property
    def is_directory(self) -> bool:
        """Whether what is written is a directory."""
        return not self.suffix


FORMATS: dict[str, ExportFormat] = {
    "gguf": ExportFormat("ftlevel.merging.formats.gguf", ".gguf", (".Modelfile",)),
    "adapterhub": ExportFormat("ftlevel.merging.formats.adapterhub", "", merges=False),
}
"""Every format: a new one is its module and a line here."""

if TYPE_CHECKING:
    FormatName: TypeAlias = str
else:
    FormatName = Literal[tuple(FORMATS)]


class ExportConfig(Section):
    """Everything that decides an export."""

    model: str = Field(
        min_length=1,
        description="Run, adapter or model: a Hub id, a local directory, or builtin:NAME. An "
        "adapter is merged into its base first, where the format is one of models.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    format: FormatName = Field(
        "gguf",
        description="gguf, the format of llama.cpp, Ollama and LM Studio; adapterhub, a bottleneck "
        "adapter as AdapterHub's adapters loads it.",
    )
    outtype: Literal["auto", "f32", "f16", "bf16", "q8_0"] = Field(
        "auto",
        description="Type of the matrices; q8_0 is 8 bits in blocks of 32. auto keeps the model's "
        "own. Vectors and norms stay in float32.",
    )
    out: Path = Field(
        description="File to write, FILE.gguf, with FILE.Modelfile beside it; for adapterhub a new "
        "directory."
    )
    overwrite: bool = Field(False, description="Replace these files where they exist.")
    verify: bool = Field(
        True,
        description="Read the file back and compare its logits and its tokens with the model's.",
    )
    verify_tokens: Positive = Field(512, description="How many tokens of text are compared.")
    base_model: str | None = Field(
        None,
        min_length=1,
        description="Where an adapter's base model is now, if it has moved; its weights must be "
        "the same.",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Where the models are compared."
    )

    @field_validator("out")
    @classmethod
    def _is_named_by_its_format(cls, value: Path, info: ValidationInfo) -> Path:
        format_ = FORMATS.get(info.data.get("format", ""))
        if format_ is not None and format_.suffix not in ("", value.suffix):
            raise ValueError(
                f"{value} does not end in {format_.suffix}, by which programs know the format. "
                f"Name it {value.with_suffix(format_.suffix)}"
            )
        return value

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The files that are written, `out` first."""
        beside = FORMATS[self.format].beside
        return (self.out, *(self.out.with_suffix(suffix) for suffix in beside))
