"""What is known of the programs that serve models: a row each, with where it was read or run.

Free of torch, as `--for` names the rows. What a row says of a version was measured or read in that
version; docs/serving.md has the table, and `make served` runs what can be run here.
"""

from __future__ import annotations

from dataclasses import dataclass

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
