"""What `ftlevel export` is told: the run or model, the format, and the file.

What is known of the programs that serve models: a row each, with where it was read or run.

Free of torch, as `--for` names the rows. What a row says of a version was measured or read in that
version; docs/serving.md has the table, and `make served` runs what can be run here.

What `ftlevel check-served` is told: what was exported, and the server to hold to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ftlevel.config.output import HubSection
from ftlevel.config.section import check_directory_name
from ftlevel.config.sections import Positive, Section

_RANKS_OF_VLLM = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")


@dataclass(frozen=True)
class Server:
    """One program, and what it makes of an adapter.

    Attributes:
        name: as after `--for`.
        title: as it calls itself.
        formats: what it loads, the best first.
        version: in which the rest was found.
        source: how.
        ranks: values that its limit of ranks may have; empty for any.
        vocabulary: whether it serves LoRA on embeddings and output layers as trained.
        every_layer: whether a kind of linear must be adapted in all layers or in none.
        families: those it is known to name as transformers does; empty for any.
        several: how many adapters it holds at once: any, or one.
        merged: what it serves merged, beside decoders that write text.
        own_template: whether the chat template is that of the base unless it is told another.
        note: what else must be known, as a sentence without a full stop.
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
    merged: tuple[str, ...] = ()
    own_template: bool = True
    note: str = ""


SERVERS: dict[str, Server] = {
    row.name: row
    for row in (
        Server(
            "vllm", "vLLM", ("peft", "merged"), "0.32.0", "run, and PEFTHelper read",
            ranks=_RANKS_OF_VLLM, vocabulary=True, merged=("classifiers",),
        ),
        Server(
            "sglang", "SGLang", ("peft", "merged"), "November 2026", "read; not run",
            every_layer=True, merged=("classifiers",),
        ),
        Server(
            "tgi", "Text Generation Inference", ("peft", "merged"), "November 2026",
            "read; not run", every_layer=True, merged=("encoder-decoder",),
        ),
        Server(
            "llama.cpp", "llama.cpp", ("gguf-lora", "gguf"), "xllamacpp 2026.10.11549",
            "run, and convert_lora_to_gguf.py read",
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
            note="OpenVINO GenAI needs the base in its own format, which optimum-intel writes",
        ),
    )
}  # fmt: skip
"""Every server by its name."""


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
