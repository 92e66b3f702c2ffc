"""Configuration of `ftlevel export` and `check-served`, and the table of supported servers.

Servers were checked at the version in their row (docs/serving.md). Must not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ftlevel.config.output import HubSection
from ftlevel.config.section import Address, Positive, Section, validate_dir_name
from ftlevel.config.sections import DeviceName, MovedBase
from ftlevel.errors import ConfigError, has_no_effect, needs
from ftlevel.extensions import ExportFormat, added_rows

_RANKS_OF_VLLM = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")


@dataclass(frozen=True)
class EmbeddingSupport:
    """How a server computes embeddings.

    Attributes:
        format: export format of embedding models for this server.
        prompts: whether the server itself adds query and document prompts to texts.
        normalizes: whether returned embeddings have length 1 even if the model does not normalize.
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
        formats: export formats that it loads, best first.
        version: server version that the other properties were checked with.
        source: how the properties were checked; `read; not run` means in its source code only.
        ranks: allowed values of the server's option for the maximum LoRA rank; empty if any.
        vocabulary: whether it serves LoRA on embeddings and on the output layer.
        every_layer: whether each kind of linear layer must be adapted in all blocks or in none.
        families: model types that it serves; empty if all.
        several: whether it serves several adapters at once.
        merged: kinds of merged models that it serves: decoder, classifiers, rerankers.
        embeddings: how it serves embedding models; None if it does not.
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


FORMATS: dict[str, ExportFormat] = added_rows("export_formats")
"""Export formats by name."""

if TYPE_CHECKING:
    FormatName: TypeAlias = str
    ServerName: TypeAlias = str
else:
    FormatName = Literal[tuple(("auto " + " ".join(FORMATS)).split())]
    ServerName = Literal[tuple(SERVERS)]


DRY_RUN = Path("dry-run")
"""Output path of a dry run without `--out`; the suffix of the format is appended."""


class ExportConfig(HubSection):
    """Configuration of `ftlevel export`."""

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
        description="Output format; auto: the format that --for needs (gguf for an --out that ends "
        "in .gguf), else gguf. peft, gguf-lora and mlx keep the adapter separate, as plain LoRA; "
        "merged is a full model; gguf is one file for llama.cpp, Ollama and LM Studio.",
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
        description="Whether clients add the prompts of an embedding model to texts. Required for"
        " servers that do not add them.",
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
    verify_tokens: Positive = Field(
        512, description="Number of tokens of text to compare outputs on."
    )
    base_model: MovedBase = None
    device: DeviceName = Field("auto", description="Device for the comparison.")

    @model_validator(mode="before")
    @classmethod
    def _format_of_file(cls, raw: Any) -> Any:
        # The server loads .gguf files, and `out` is one.
        if not isinstance(raw, dict):
            return raw
        server = SERVERS.get(str(raw.get("server")))
        is_file = Path(str(raw.get("out", ""))).suffix == FORMATS["gguf"].suffix
        if server and "gguf" in server.formats and is_file and raw.get("format") in (None, "auto"):
            return {**raw, "format": "gguf"}
        return raw

    @field_validator("server", "format", mode="before")
    @classmethod
    def _validate_option(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name == "server" and value in FORMATS and value not in SERVERS:
            raise ValueError(f"it is a format, and --for names a server. Use --format {value}")
        if info.field_name == "format" and value in SERVERS and value not in FORMATS:
            raise ValueError(f"it is a server, and --format names a format. Use --for {value}")
        return value

    @field_validator("format")
    @classmethod
    def _validate_server(cls, value: str, info: ValidationInfo) -> str:
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
    def _validate_outtype(cls, value: str, info: ValidationInfo) -> str:
        format_ = info.data.get("format", "gguf")
        if value != "auto" and format_ != "gguf":
            raise ValueError(
                f"it is a type of the merged model in one file, and {format_} is written. Add "
                "--format gguf, or drop it"
            )
        return value

    @field_validator("out")
    @classmethod
    def _validate_suffix(cls, value: Path, info: ValidationInfo) -> Path:
        if "server" not in info.data:  # invalid server; the format depends on it
            return value
        format_ = FORMATS.get(info.data.get("format", ""))
        if format_ is not None and format_.is_directory:
            return validate_dir_name(value)
        value = value.expanduser()
        if format_ is not None and format_.suffix not in ("", value.suffix):
            raise ValueError(
                f"{value} does not end in {format_.suffix}, by which programs know the format. "
                f"Name it {value.with_suffix(format_.suffix)}"
            )
        return value

    def list_conflicts(self) -> Iterator[str]:
        """Yields an error message per conflict."""
        yield from super().list_conflicts()
        given = self.model_fields_set
        if "calibration_rows" in given and self.outtype not in ("q5_0", "q4_0"):
            yield needs("--calibration-rows", f"--outtype q5_0 or q4_0 (it is {self.outtype})")
        if "max_rank" in given and FORMATS[self.format].merges:
            yield has_no_effect("--max-rank", f"--format {self.format}", "it is for adapters")

    def for_embeddings(self) -> ExportConfig:
        """Returns this configuration with the server's format for embedding models.

        Raises ConfigError if `out` does not end in the suffix of that format.
        """
        server = SERVERS.get(self.server or "")
        if server is None or "format" in self.model_fields_set:
            return self
        format_ = server.embeddings.format if server.embeddings else "merged"
        values = {**self.model_dump(exclude_unset=True), "format": format_}
        suffix = FORMATS[format_].suffix
        if self.out == DRY_RUN:
            values["out"] = self.out.with_suffix(suffix)
        elif suffix not in ("", self.out.suffix):
            raise ConfigError(
                f"--out {self.out} does not end in {suffix}: {server.title} loads embedding models "
                f"as {format_}. Name it {self.out.with_suffix(suffix)}."
            )
        return ExportConfig(**values)

    @property
    def recorded(self) -> bool:
        """Whether the model's outputs are saved to FILE.served.json, for `ftlevel check-served`."""
        return bool(self.server and self.verify and FORMATS[self.format].suffix)

    @property
    def outputs(self) -> tuple[Path, ...]:
        """Paths of all output files, `out` first."""
        suffixes = FORMATS[self.format].beside + ((".served.json",) if self.recorded else ())
        return (self.out, *(self.out.with_suffix(suffix) for suffix in suffixes))

    @property
    def entries(self) -> dict[str, Any]:
        """Part of a .gguf export's summary: `model`, `format`, `out`, `modelfile` and `outputs`."""
        return {
            "model": self.model,
            "format": self.format,
            "out": str(self.out),
            "modelfile": str(self.outputs[1]),
            "outputs": [str(path) for path in self.outputs],
        }


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
