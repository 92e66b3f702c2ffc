"""Tiny real models of every family and head, built from configs: two layers, hidden size 64.

The width of each linear layer is a multiple of 64, for 4-bit blocks. Noise is added to all weights,
so that no bias is zero and no norm is one, and a missing term changes the result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from tiny_tokenizers import MAX_LENGTH, build_tokenizer

VOCAB = 704  # at least what every tokenizer of tiny_tokenizers uses
HIDDEN, INNER, LAYERS, HEADS_COUNT, KV_HEADS = 64, 128, 2, 4, 2
LABELS = 3

_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS_COUNT,
    "intermediate_size": INNER,
    "max_position_embeddings": MAX_LENGTH,
    "pad_token_id": 0,
}
_DECODER = {
    **_ENCODER,
    "num_key_value_heads": KV_HEADS,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN = {**_DECODER, "bos_token_id": 500, "eos_token_id": 502, "pad_token_id": 500}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": HIDDEN // HEADS_COUNT,
    "d_ff": INNER,
    "num_layers": LAYERS,
    "num_heads": HEADS_COUNT,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    # RoBERTa counts positions from pad_token_id + 1.
    "roberta": {
        **_ENCODER,
        "max_position_embeddings": MAX_LENGTH + 2,
        "type_vocab_size": 1,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    },
    "distilbert": {
        "vocab_size": VOCAB,
        "dim": HIDDEN,
        "hidden_dim": INNER,
        "n_layers": LAYERS,
        "n_heads": HEADS_COUNT,
        "max_position_embeddings": MAX_LENGTH,
        "pad_token_id": 0,
    },
    # A narrower embedding than the hidden size, so that the projection between them exists.
    "electra": {**_ENCODER, "embedding_size": 32},
    "albert": {**_ENCODER, "embedding_size": 32, "bos_token_id": 2, "eos_token_id": 3},
    "deberta-v2": {
        **_ENCODER,
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_biased_input": False,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 32,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
    },
    "modernbert": {
        **_ENCODER,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "local_attention": 32,
        "global_attn_every_n_layers": 2,
        "reference_compile": False,
    },
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS_COUNT,
        "n_positions": MAX_LENGTH,
        "bos_token_id": 500,
        "eos_token_id": 500,
    },
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_layers": LAYERS,
        "num_heads": HEADS_COUNT,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 32,
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": 500,
        "eos_token_id": 500,
    },
    "gpt_neox": {**_ENCODER, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None},
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS_COUNT,
        "max_position_embeddings": MAX_LENGTH,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    },
    "llama": _DECODER,
    "mistral": {**_DECODER, "sliding_window": None},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 16},
    "gemma3_text": {
        **_DECODER,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    },
    "phi3": {**_DECODER, "bos_token_id": 1, "eos_token_id": 659, "pad_token_id": 659},
    "mixtral": {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_QWEN,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
    },
    "t5": _T5,
    "mt5": {**_T5, "feed_forward_proj": "gated-gelu"},
    "bart": {
        "vocab_size": VOCAB,
        "d_model": HIDDEN,
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": HEADS_COUNT,
        "decoder_attention_heads": HEADS_COUNT,
        "encoder_ffn_dim": INNER,
        "decoder_ffn_dim": INNER,
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    },
}

FAMILIES = tuple(CONFIGS)

AUTO_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "mlm": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "seqcls": "AutoModelForSequenceClassification",
    "tokcls": "AutoModelForTokenClassification",
    "qa": "AutoModelForQuestionAnswering",
    "base": "AutoModel",
}

# Heads of each family in transformers; the first one is that of its published checkpoints.
_UNDERSTANDING = ("seqcls", "tokcls", "qa")
_MASKED = ("bert", "roberta", "distilbert", "electra", "albert", "deberta-v2", "modernbert")
_CAUSAL = ("gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "mixtral")
_QWENS = ("qwen2", "qwen3", "qwen3_moe")
HEADS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_MASKED, ("mlm", *_UNDERSTANDING)),
    **dict.fromkeys(_CAUSAL + _QWENS, ("causal", *_UNDERSTANDING)),
    "opt": ("causal", "seqcls", "qa"),
    "gemma3_text": ("causal", "seqcls"),
    "phi3": ("causal", "seqcls", "tokcls"),
    "t5": ("seq2seq", *_UNDERSTANDING),
    "mt5": ("seq2seq", *_UNDERSTANDING),
    "bart": ("seq2seq", "seqcls", "qa"),
}

FAMILY_HEADS = [(family, head) for family in FAMILIES for head in HEADS[family]]


def build_config(family: str, head: str | None = None, **overrides: Any) -> Any:
    """Return the config of a tiny model; `overrides` replace single values."""
    values = {**CONFIGS[family], **overrides}
    if head in ("seqcls", "tokcls"):
        values.setdefault("num_labels", LABELS)
    if head == "seqcls" and values.get("pad_token_id") is None:
        # Decoders need a pad token to classify more than one row at a time.
        values["pad_token_id"] = values["eos_token_id"]
    return AutoConfig.for_model(family, **values)


def build(family: str, head: str | None = None, seed: int = 0, **overrides: Any) -> Any:
    """Return a tiny model in eval mode, the same for the same arguments.

    Args:
        family: one of `FAMILIES`, the `model_type` of transformers.
        head: one of `HEADS[family]`; by default, that of its published checkpoints.
        seed: of the weights; the global random state is not changed.
        overrides: config values to replace.
    """
    head = head or HEADS[family][0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto_class = getattr(transformers, AUTO_CLASSES[head])
        model = auto_class.from_config(build_config(family, head, **overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def build_batch(
    family: str, head: str | None = None, batch: int = 2, length: int = 12, seed: int = 1
) -> dict[str, torch.Tensor]:
    """Return inputs and labels for a model of `build`; the first row has three pad positions.

    Shapes: `input_ids`, `attention_mask` (batch, length); `labels` depend on the head.
    """
    head = head or HEADS[family][0]
    generator = torch.Generator().manual_seed(seed)
    config = build_config(family, head)
    ids = torch.randint(10, 490, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if config.is_encoder_decoder and head == "seqcls":
        # These classify the last end-of-sequence token of a row.
        ids[1:, -1] = config.eos_token_id
        ids[0, -4] = config.eos_token_id
    ids[0, -3:] = config.pad_token_id or 0
    mask[0, -3:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if head == "base":
        return inputs
    if head in ("causal", "mlm"):
        inputs["labels"] = torch.where(mask.bool(), ids, -100)
    elif head == "seq2seq":
        inputs["labels"] = torch.randint(10, 490, (batch, 7), generator=generator)
    elif head == "seqcls":
        inputs["labels"] = torch.randint(0, LABELS, (batch,), generator=generator)
    elif head == "tokcls":
        inputs["labels"] = torch.randint(0, LABELS, (batch, length), generator=generator)
    else:
        inputs["start_positions"] = torch.arange(batch) % 4 + 1
        inputs["end_positions"] = torch.arange(batch) % 4 + 3
    return inputs


def compute_logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of any head without gradients; qa has start and end logits concatenated."""
    with torch.no_grad():
        output = model(**inputs)
    if hasattr(output, "start_logits"):
        return torch.cat([output.start_logits, output.end_logits], -1)
    logits: torch.Tensor = output.logits
    return logits


def save_tiny(
    directory: Path,
    family: str,
    head: str | None = None,
    *,
    chat: bool | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a tiny model and its tokenizer to `directory`, as a checkpoint that commands load."""
    model = build(family, head, seed, **overrides)
    if (
        family == "phi3" and model.can_generate()
    ):  # as in the real checkpoint, generation stops at any of several tokens
        model.generation_config.eos_token_id = [659, 660, 663]
    model.save_pretrained(directory)
    build_tokenizer(family, chat).save_pretrained(directory)
    return directory
