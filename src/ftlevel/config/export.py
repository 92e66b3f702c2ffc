"""Configuration of `ftlevel merge`, `quantize` and `export`, and the table of supported servers.

Servers were checked at the version in their row (docs/serving.md). Must not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ftlevel.config.constraints import Constraints, Excludes, Needs
from ftlevel.config.output import HubSection
from ftlevel.config.section import NewDirectory, validate_dir_name
from ftlevel.config.sections import DeviceName, Dtype, MovedBase, Positive, QuantConfig
from ftlevel.errors import ConfigError, has_no_effect, needs
from ftlevel.extensions import ExportFormat, added_rows

Strategy = Literal["cat", "svd", "linear", "ties", "dare-ties", "dare-linear", "magnitude-prune"]
_PRUNING = ("ties", "dare-ties", "dare-linear", "magnitude-prune")
_QUANTIZED = ("4bit", "8bit", "quantized", "nf4", "fp4")


class MergeConfig(HubSection):
    """Configuration of `ftlevel merge`."""

    constraints: ClassVar[Constraints] = (
        Needs("quant_type", "quant=4bit"),
        Needs("double_quant", "quant=4bit"),
        Excludes("onto=original", "quant", "it approximates the trained model", "Drop --onto."),
        Needs("density", f"strategy={'|'.join(_PRUNING)}"),
    )
    adapters: list[str] = Field(
        min_length=1, description="Run or adapter to merge; several are combined into one first."
    )
    output_dir: NewDirectory = Field(
        description="Output directory of the merged model; it must not exist."
    )
    onto: Literal["auto", "original", "dequantized"] = Field(
        "auto",
        description="Base weights that a quantized run is merged into. dequantized: the weights "
        "used in training; original: the weights before quantization; auto: the one measured to "
        "be closer to the trained model.",
    )
    base_model: MovedBase = None
    dtype: Dtype = Field(
        "auto", description="Data type of the merged weights; auto: that of the base model."
    )
    quant: Literal["none", "4bit", "8bit"] = Field(
        "none",
        description="Quantization of the merged model: none, 4bit or 8bit. Codes are calibrated to "
        "preserve the trained layer outputs; rounding to nearest would erase the update.",
    )
    quant_type: Literal["nf4", "fp4"] | None = Field(
        None, description="4-bit data type; default: that of the run, else nf4."
    )
    double_quant: bool | None = Field(
        None, description="Whether to quantize the 4-bit scales too; default: as in the run."
    )
    calibration_rows: Annotated[int, Field(ge=0)] = Field(
        128, description="Number of training rows for calibration; 0 rounds to nearest."
    )
    device: DeviceName = Field(
        "auto", description="Device for the comparison; merging itself runs on the CPU."
    )
    verify: bool = Field(
        True,
        description="Whether to compare the merged model with base model and adapter. Rows of "
        "the run's data are used.",
    )
    rows: Positive = Field(32, description="Maximum number of rows to compare.")
    weights: list[float] | None = Field(
        None, description="Comma-separated weights of the adapters, e.g. 0.7,0.3; default: 1 each."
    )
    strategy: Strategy = Field(
        "cat",
        description="Method that combines several adapters. cat: exact weighted sum of the "
        "updates (ranks add up); svd: that sum truncated to the adapters' largest rank; linear: A "
        "and B averaged separately, which is not the sum of the updates; ties, dare-linear, "
        "dare-ties, magnitude-prune: linear after pruning small (ties, magnitude) or random "
        "(dare) entries; ties also drops entries of opposite sign.",
    )
    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Fraction of entries kept by ties, dare and magnitude-prune; default: 0.5.",
    )

    @field_validator("adapters", mode="before")
    @classmethod
    def _convert_adapters(cls, value: Any) -> Any:
        adapters = value if isinstance(value, list | tuple) else [value]
        return [os.fspath(one) if isinstance(one, os.PathLike) else one for one in adapters]

    @field_validator("onto", mode="before")
    @classmethod
    def _validate_onto(cls, value: object) -> object:
        if value in _QUANTIZED:
            raise ValueError(
                "weights of 4 or 8 bits cannot hold the update: rounding it to their grid erases "
                "most of what was trained. Use --quant 4bit, which chooses the codes by what was "
                "trained, or merge with --onto auto"
            )
        return value

    @field_validator("weights", mode="before")
    @classmethod
    def _split_weights(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value

    def list_conflicts(self) -> Iterator[str]:
        """Yields an error message per conflict."""
        yield from super().list_conflicts()
        num_adapters, weights = len(self.adapters), self.weights
        if weights is not None and len(weights) != num_adapters:
            yield (
                f"--weights gives {len(weights)} numbers for {num_adapters} adapters. "
                "Give one each."
            )
        if 0 in (weights or ()):
            yield "--weights has a 0: leave that adapter out."
        if num_adapters == 1 and self.strategy != "cat":
            yield needs(f"--strategy {self.strategy}", "several adapters", fix="Drop it.")
        if self.quant == "none" and "calibration_rows" in self.model_fields_set:
            yield needs("--calibration-rows", "--quant 4bit or 8bit")


class QuantizeConfig(HubSection):
    """Configuration of `ftlevel quantize`."""

    constraints: ClassVar[Constraints] = (
        Needs("double_quant", "quant=4bit"),
        Needs("quant_type=fp4", "quant=4bit"),
    )
    model: str = Field(
        min_length=1, description="Model: Hub id, local directory, .gguf file, or builtin:NAME."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    quant: Literal["4bit", "8bit"] = Field(
        description="Quantization: 4bit or 8bit. 4bit is NF4 or FP4 in blocks of 64; 8bit is "
        "LLM.int8()."
    )
    quant_type: Literal["nf4", "fp4"] = Field(
        "nf4", description="4-bit data type; nf4 is more accurate (QLoRA, section 3)."
    )
    double_quant: bool = Field(
        False,
        description="Whether to quantize the 4-bit scales too; saves about 0.4 bit per weight.",
    )
    dtype: Dtype = Field(
        "auto", description="Data type of non-quantized tensors; auto: that of the model."
    )
    out: NewDirectory = Field(description="Output directory; it must not exist.")
    measure: bool = Field(True, description="Whether to compare the result to the source on text.")
    eval_text: Path | None = Field(
        None, description="Text file for the comparison; default: Python library documentation."
    )
    eval_tokens: Positive = Field(2048, description="Number of tokens of --eval-text to use.")
    device: DeviceName = Field(
        "auto", description="Device for the comparison; quantization runs on the CPU."
    )

    @property
    def form(self) -> str:
        """Short description of the quantization, such as `4-bit nf4`."""
        return self.section.form

    @property
    def section(self) -> QuantConfig:
        """Equivalent `quant` section of a training run."""
        return QuantConfig(
            kind=self.quant, quant_type=self.quant_type, double_quant=self.double_quant
        )


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
