"""Models and comparisons for the tests of `export` and llama.cpp."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from ftlevel.extras.serving.config import ExportConfig
from ftlevel.extras.serving.exporting import ExportResult, export
from tiny_tokenizers import as_sentencepiece, build_tokenizer

ModelDir = Callable[..., Path]
SENTENCEPIECE = ("llama", "mistral", "gemma3_text", "phi3")
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0],
    "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 2.0, 2.0, 2.0],
    "original_max_position_embeddings": 256,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
GEMMA = {"num_hidden_layers": 6, "layer_types": None}
GEMMA_LINEAR = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}
CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("gpt2", {"n_positions": 1024}, []),
    ("gpt2", {}, ["n_positions"]),
    ("llama", {}, []),
    ("llama", {"tie_word_embeddings": True}, []),
    ("llama", {"attention_bias": True, "mlp_bias": True}, ["attention_bias", "mlp_bias"]),
    ("llama", {"rope_parameters": LLAMA_3}, ["rope_parameters"]),
    ("llama", {"rope_parameters": LINEAR}, ["rope_parameters"]),
    ("mistral", {"head_dim": 32}, []),
    ("qwen2", {}, []),
    ("qwen3", {"head_dim": 128}, []),
    ("qwen3", {}, ["head_dim"]),
    ("gemma3_text", {**GEMMA, "query_pre_attn_scalar": 16}, ["query_pre_attn_scalar"]),
    (
        "gemma3_text",
        {**GEMMA, "rope_parameters": GEMMA_LINEAR, "final_logit_softcapping": 1.0},
        ["final_logit_softcapping", "query_pre_attn_scalar", "rope_parameters"],
    ),
    ("phi3", {}, []),
    (
        "phi3",
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 256},
        ["original_max_position_embeddings", "rope_parameters"],
    ),
]
NAMES = [f"{family}-{'-'.join(settings)}" for family, settings, _ in CASES]


def exportable_model(tiny_model_dir: ModelDir, folder: Path, family: str, **overrides: Any) -> Path:
    """Return a tiny model whose tokenizer llama.cpp supports."""
    model_dir = tiny_model_dir(family, **overrides)
    if family not in SENTENCEPIECE:
        return model_dir
    copy = shutil.copytree(model_dir, folder / "model")
    as_sentencepiece(build_tokenizer(family)).save_pretrained(copy)
    return copy


def export_to(name: str, model: Path | str, **settings: Any) -> ExportResult:
    return export(ExportConfig(model=str(model), out=Path(name), **settings))


def compute_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits[0]
    return logits


def load_model(model: Path, **arguments: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, **arguments
    ).eval()


def create_ids(count: int = 48) -> torch.Tensor:
    return torch.randint(10, 490, (1, count), generator=torch.Generator().manual_seed(0))
