"""Chat templates, written from the published formats of five families (chat_templates).

They differ in details that matter for supervision: Llama 3 strips contents and has header tokens,
Qwen3 adds an empty reasoning block to the last answer only, Gemma 3 has no system role and names
the assistant model, Mistral has no generation prompt and moves the system text to the last
question.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import tiny_tokenizers

TEMPLATES = {
    path.stem: path.read_text("utf-8")
    for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
    if not path.stem.startswith("tiny-")
}


def byte_level_tokenizer(bos: str | None, eos: str, *others: str) -> Any:
    """Return a byte-level tokenizer with these special tokens, which it does not add to texts."""
    special_tokens = [token for token in (bos, eos, *others) if token]
    parts = tiny_tokenizers._byte_level_parts(special_tokens)
    backend = Tokenizer(models.BPE(**parts))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, additional_special_tokens=[*others]
    )


def build(name: str) -> Any:
    """Return a tokenizer with the special tokens and the template of a family."""
    makers = {
        "chatml": lambda: byte_level_tokenizer(None, "<|im_end|>", "<|im_start|>"),
        "llama-3": lambda: byte_level_tokenizer(
            "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
            "<|eot_id|>",
        ),
        "qwen-3": tiny_tokenizers.qwen_tokenizer,
        "gemma-3": tiny_tokenizers.gemma_tokenizer,
        "mistral": tiny_tokenizers.llama_tokenizer,
    }  # fmt: skip
    tokenizer = makers[name]()
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer
