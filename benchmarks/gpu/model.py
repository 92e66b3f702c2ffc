"""Create a random Llama-3-8B on the GPU machine, so that no weights are copied there.

Speed and memory do not depend on the values of weights. The tokenizer is that of ftlevel's built-in
model, which has 1.4 times as many tokens per docstring as SmolLM2's.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from training.tools import TEMPLATE
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ftlevel.models.sources import builtin_path

LLAMA_3_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
"""Sizes of Llama 3 8B."""
TINY = {
    "hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 3072,
}  # fmt: skip


def write_llama(folder: Path, device: str, *, tiny: bool) -> None:
    """Write the model in bfloat16 to `folder`, unless it exists.

    Args:
        folder: output directory in transformers' format.
        device: device of the random initialization; 32 layers take minutes on a CPU.
        tiny: two narrow layers instead of 32.
    """
    if (folder / "config.json").is_file():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(builtin_path("tiny-llama"))
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    config = LlamaConfig(**{**LLAMA_3_8B, **(TINY if tiny else {}), **ids})
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(partial)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
