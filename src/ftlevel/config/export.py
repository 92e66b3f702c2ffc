"""What `ftlevel export` is told: the run or model, the format, and the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator

from ftlevel.config.commands.servers import SERVERS
from ftlevel.config.options.hub import HubSection
from ftlevel.config.section import check_directory_name
from ftlevel.config.sections import Positive


@dataclass(frozen=True)
class ExportFormat:
    """Where a format is found, and what its files are called.

    Attributes:
        module: that writes it.
        suffix: of the file; empty for a format that is a directory.
        beside: suffixes of the files that come beside it.
        merges: whether an adapter is merged into its base first.
        several: whether a directory of adapters of one base is written at once.
    """

    module: str
    suffix: str
    beside: tuple[str, ...] = ()
    merges: bool = True
    several: bool = False

    @property
    def is_directory(self) -> bool:
        """Whether what is written is a directory."""
        return not self.suffix


FORMATS: dict[str, ExportFormat] = {
    "gguf": ExportFormat("ftlevel.merging.formats.gguf", ".gguf", (".Modelfile",)),
    "adapterhub": ExportFormat("ftlevel.merging.formats.adapterhub", "", merges=False),
    "peft": ExportFormat("ftlevel.merging.formats.peft", "", merges=False, several=True),
    "gguf-lora": ExportFormat("ftlevel.merging.formats.gguf_lora", "", merges=False, several=True),
    "mlx": ExportFormat("ftlevel.merging.formats.mlx", "", merges=False),
    "merged": ExportFormat("ftlevel.merging.formats.merged", ""),
}
"""Every format: a new one is its module and a line here."""

if TYPE_CHECKING:
    FormatName: TypeAlias = str
    ServerName: TypeAlias = str
else:
    FormatName = Literal[tuple(("auto " + " ".join(FORMATS)).split())]
    ServerName = Literal[tuple(SERVERS)]


class ExportConfig(HubSection):
    """Everything that decides an export."""

    model: str = Field(
        min_length=1,
        description="Run, adapter or model: a Hub id, a local directory, or builtin:NAME. An "
        "adapter is merged into its base first, where the format is one of models.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    server: ServerName | None = Field(
        None,
        description="The program that will serve it: chooses the format and checks what that "
        "program can load.",
    )
    format: FormatName = Field(
        "auto",
        validate_default=True,
        description="peft, gguf-lora and mlx keep the adapter beside its base, as plain LoRA that "
        "every reader reads alike; merged is a plain model; gguf one file for llama.cpp, Ollama "
        "and LM Studio; adapterhub a bottleneck adapter for AdapterHub's adapters. auto is what "
        "--for needs, or gguf.",
    )
    outtype: Literal["auto", "f32", "f16", "bf16", "q8_0", "q5_0", "q4_0"] = Field(
        "auto",
        description="Type of the matrices; q8_0 is 8 bits in blocks of 32, q5_0 and q4_0 5 and "
        "4, where codes are chosen so that the layers give what they give as trained. auto keeps "
        "the model's own. Vectors and norms stay in float32.",
    )
    calibration_rows: Annotated[int, Field(ge=0)] = Field(
        128,
        description="Rows of the run's training data, or of documentation where there is no run, "
        "on which the layers' outputs count where codes of q5_0 or q4_0 are chosen; 0 rounds each "
        "weight by itself.",
    )
    out: Path = Field(
        description="File to write, FILE.gguf, with FILE.Modelfile beside it; for the other "
        "formats a new directory."
    )
    max_rank: Positive = Field(
        64, description="Highest rank of plain LoRA that may be written; past it, merging is named."
    )
    overwrite: bool = Field(False, description="Replace these files where they exist.")
    verify: bool = Field(
        True,
        description="Read what was written back and compare it with the model. With --for, and "
        "of adapters, record its answers for ftlevel check-served.",
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

    @field_validator("server", "format", mode="before")
    @classmethod
    def _check_option(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a format given as a server, and a server given as a format."""
        if info.field_name == "server" and value in FORMATS and value not in SERVERS:
            raise ValueError(f"it is a format, and --for names a server. Use --format {value}")
        if info.field_name == "format" and value in SERVERS and value not in FORMATS:
            raise ValueError(f"it is a server, and --format names a format. Use --for {value}")
        return value

    @field_validator("format")
    @classmethod
    def _is_served(cls, value: str, info: ValidationInfo) -> str:
        server = SERVERS.get(info.data.get("server") or "")
        if value == "auto":
            return server.formats[0] if server else "gguf"
        if server and value not in server.formats:
            raise ValueError(
                f"{server.title} does not load {value}. It loads {' and '.join(server.formats)}; "
                f"drop --format, and it is {server.formats[0]}"
            )
        return value

    @field_validator("outtype")
    @classmethod
    def _is_of_one_file(cls, value: str, info: ValidationInfo) -> str:
        format_ = info.data.get("format", "gguf")
        if value != "auto" and format_ != "gguf":
            raise ValueError(
                f"it is a type of the merged model in one file, and {format_} is written. Add "
                "--format gguf, or drop it"
            )
        return value

    @field_validator("out")
    @classmethod
    def _is_named_by_its_format(cls, value: Path, info: ValidationInfo) -> Path:
        if "server" not in info.data:  # it is wrong, and the format follows from it
            return value
        format_ = FORMATS.get(info.data.get("format", ""))
        if format_ is not None and format_.is_directory:
            return check_directory_name(value)
        if format_ is not None and format_.suffix not in ("", value.suffix):
            raise ValueError(
                f"{value} does not end in {format_.suffix}, by which programs know the format. "
                f"Name it {value.with_suffix(format_.suffix)}"
            )
        return value

    @property
    def recorded(self) -> bool:
        """Whether a served.json stands beside the file."""
        return bool(self.server and self.verify and FORMATS[self.format].suffix)

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The files that are written, `out` first."""
        format_ = FORMATS[self.format]
        beside = format_.beside + ((".served.json",) if self.recorded else ())
        return (self.out, *(self.out.with_suffix(suffix) for suffix in beside))
