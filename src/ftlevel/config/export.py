"""Configuration of `ftlevel export`, and the table of supported servers.

Facts hold for the server version in their row (docs/serving.md). Must not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ftlevel.config.output import HubSection
from ftlevel.config.section import check_directory_name
from ftlevel.config.sections import DeviceName, MovedBase, Positive
from ftlevel.errors import ConfigError
from ftlevel.extensions import ExportFormat, added_rows

_RANKS_OF_VLLM = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")


@dataclass(frozen=True)
class EmbeddingSupport:
    """How a server computes embeddings.

    Attributes:
        format: format of an embedding model.
        prompts: whether it applies the prompts of the model, or of its start command.
        normalizes: whether embeddings have length 1 even if the model does not normalize.
        pooling: supported pooling modes.
    """

    format: str = "merged"
    prompts: bool = False
    normalizes: bool = False
    pooling: tuple[str, ...] = ("mean", "cls", "last")


@dataclass(frozen=True)
class Server:
    """Model server and what it supports.

    Attributes:
        formats: formats it loads, best first.
        version: version the other facts were checked with.
        source: how they were checked.
        ranks: values its maximum LoRA rank can have; empty for any.
        vocabulary: whether it serves LoRA on embeddings and output layers.
        every_layer: whether a linear layer must be adapted in all blocks or in none.
        families: model families that work; empty for any.
        several: whether it serves several adapters at once.
        merged: what it serves merged: kinds of models that generate text, classifiers, rerankers.
        embeddings: how it serves embedding models; None if it does not.
        own_template: whether it uses the base model's chat template by default.
    """

    name: str
    title: str
    formats: tuple[str, ...]
    version: str
    source: str
    ranks: tuple[int, ...] = ()
    vocabulary: bool = False
    every_layer: bool = False
    families: tuple[str, ...] = ()
    several: bool = True
    merged: tuple[str, ...] = ("decoder",)
    embeddings: EmbeddingSupport | None = None
    own_template: bool = True
    note: str = ""


SERVERS: dict[str, Server] = {
    row.name: row
    for row in (
        Server(
            "vllm", "vLLM", ("peft", "merged"), "0.32.0", "run, and PEFTHelper read",
            ranks=_RANKS_OF_VLLM, vocabulary=True, merged=("decoder", "classifiers", "rerankers"),
            embeddings=EmbeddingSupport(),
        ),
        Server(
            "sglang", "SGLang", ("peft", "merged"), "November 2026", "read; not run",
            every_layer=True, merged=("decoder", "classifiers"),
        ),
        Server(
            "tgi", "Text Generation Inference", ("peft", "merged"), "November 2026",
            "read; not run", every_layer=True, merged=("decoder", "encoder-decoder"),
        ),
        Server(
            "tei", "text-embeddings-inference", ("merged",), "0d124dc", "read; not run",
            merged=("classifiers", "rerankers"), several=False,
            embeddings=EmbeddingSupport(prompts=True, normalizes=True),
        ),
        Server(
            "llama.cpp", "llama.cpp", ("gguf-lora", "gguf"), "xllamacpp 2026.10.11549",
            "run, and convert_lora_to_gguf.py read",
            embeddings=EmbeddingSupport("gguf", normalizes=True),
            note="llama.cpp loads the base as a .gguf file of the same model, quantized in any way",
        ),
        Server(
            "ollama", "Ollama", ("gguf",), "0.34.1", "its pull request 14969 read; not run",
            several=False,
            note="ollama create refuses a Modelfile with ADAPTER, so the adapter is merged",
        ),
        Server(
            "mlx", "mlx-lm", ("mlx", "merged"), "0.32.2", "run on Linux",
            families=_LLAMA_LIKE, several=False,
        ),
        Server(
            "openvino", "OpenVINO GenAI", ("peft", "merged"), "2026.4.1",
            "run; it applies no scale", every_layer=True, families=_LLAMA_LIKE,
            embeddings=EmbeddingSupport(prompts=True),
            note="OpenVINO GenAI needs the base in its own format, which optimum-intel writes",
        ),
    )
}  # fmt: skip
"""Supported servers by name."""


FORMATS: dict[str, ExportFormat] = {
    "gguf": ExportFormat("ftlevel.merging.formats.gguf", ".gguf", (".Modelfile",)),
    "merged": ExportFormat("ftlevel.merging.formats.merged", ""),
}
FORMATS |= added_rows("export_formats", FORMATS)
"""Export formats by name; add a module and a line here for a new one."""

if TYPE_CHECKING:
    FormatName: TypeAlias = str
    ServerName: TypeAlias = str
else:
    FormatName = Literal[tuple(("auto " + " ".join(FORMATS)).split())]
    ServerName = Literal[tuple(SERVERS)]


class ExportConfig(HubSection):
    """Configuration of an export."""

    model: str = Field(
        min_length=1,
        description="Run, adapter or model: local path, Hub id or builtin:NAME. Formats for "
        "full models merge the adapter into its base model first.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    server: ServerName | None = Field(
        None, description="Target server; selects the format and checks compatibility."
    )
    format: FormatName = Field(
        "auto",
        validate_default=True,
        description="Output format; auto: the format that --for needs (gguf for an --out that ends "
        "in .gguf), else gguf. peft, gguf-lora and mlx keep the adapter separate, as plain LoRA; "
        "merged is a full model; gguf is one file for llama.cpp, Ollama and LM Studio; "
        "adapterhub is a bottleneck adapter for AdapterHub.",
    )
    outtype: Literal["auto", "f32", "f16", "bf16", "q8_0", "q5_0", "q4_0"] = Field(
        "auto",
        description="Data type of matrices in the .gguf file; auto: the model's own type. q8_0 "
        "uses 8 bits in blocks of 32; q5_0 and q4_0 use 5 and 4 bits, calibrated to"
        " preserve layer outputs. Vectors and norms stay in float32.",
    )
    calibration_rows: Annotated[int, Field(ge=0)] = Field(
        128,
        description="Number of calibration rows for q5_0 and q4_0; 0 rounds to nearest. Rows "
        "come from the run's training data, or from documentation without a run.",
    )
    out: Path = Field(
        description="Output file FILE.gguf (with FILE.Modelfile), or a new directory."
    )
    client_prompts: bool = Field(
        False,
        description="Whether clients put the prompts of an embedding model before texts, for "
        "servers that apply none.",
    )
    max_rank: Positive = Field(
        64, description="Maximum rank of plain LoRA; above it, merging is suggested."
    )
    overwrite: bool = Field(False, description="Whether to replace existing output files.")
    verify: bool = Field(
        True,
        description="Whether to read the output back and compare it with the model. With --for,"
        " adapters also get reference answers for ftlevel check-served.",
    )
    verify_tokens: Positive = Field(512, description="Number of text tokens to compare.")
    base_model: MovedBase = None
    device: DeviceName = Field("auto", description="Device for the comparison.")

    @model_validator(mode="before")
    @classmethod
    def _format_of_file(cls, raw: Any) -> Any:
        """Select gguf if `out` is named FILE.gguf and the server loads such a file."""
        server = SERVERS.get(str(raw.get("server")))
        is_file = Path(str(raw.get("out", ""))).suffix == FORMATS["gguf"].suffix
        if server and "gguf" in server.formats and is_file and raw.get("format") in (None, "auto"):
            return {**raw, "format": "gguf"}
        return raw

    @field_validator("server", "format", mode="before")
    @classmethod
    def _check_option(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name == "server" and value in FORMATS and value not in SERVERS:
            raise ValueError(f"it is a format, and --for names a server. Use --format {value}")
        if info.field_name == "format" and value in SERVERS and value not in FORMATS:
            raise ValueError(f"it is a server, and --format names a format. Use --for {value}")
        return value

    @field_validator("format")
    @classmethod
    def _check_server(cls, value: str, info: ValidationInfo) -> str:
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
    def _check_outtype(cls, value: str, info: ValidationInfo) -> str:
        format_ = info.data.get("format", "gguf")
        if value != "auto" and format_ != "gguf":
            raise ValueError(
                f"it is a type of the merged model in one file, and {format_} is written. Add "
                "--format gguf, or drop it"
            )
        return value

    @field_validator("out")
    @classmethod
    def _check_suffix(cls, value: Path, info: ValidationInfo) -> Path:
        if "server" not in info.data:  # invalid server; the format depends on it
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

    def for_embeddings(self) -> ExportConfig:
        """Return the configuration for an embedding model or reranker.

        Without `--format`, it has the format in which the server loads these.
        """
        server = SERVERS.get(self.server or "")
        if server is None or "format" in self.model_fields_set:
            return self
        format_ = server.embeddings.format if server.embeddings else "merged"
        if (suffix := FORMATS[format_].suffix) != self.out.suffix and suffix:
            raise ConfigError(
                f"--out {self.out} does not end in {suffix}: {server.title} loads embedding models "
                f"as {format_}. Name it {self.out.with_suffix(suffix)}."
            )
        return ExportConfig(**{**self.model_dump(exclude_unset=True), "format": format_})

    @property
    def recorded(self) -> bool:
        """Whether reference answers are written to a served.json next to the file."""
        return bool(self.server and self.verify and FORMATS[self.format].suffix)

    @property
    def outputs(self) -> tuple[Path, ...]:
        """Output files, `out` first."""
        format_ = FORMATS[self.format]
        beside = format_.beside + ((".served.json",) if self.recorded else ())
        return (self.out, *(self.out.with_suffix(suffix) for suffix in beside))
