"""What kind of transformer a config describes, and which of its modules are a task's head."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers.models.auto import modeling_auto

ModelKind = Literal["encoder", "decoder", "encoder-decoder"]


def model_kind(config: Any) -> ModelKind:
    """Return whether `config` is of an encoder, a decoder or an encoder-decoder.

    A model type that has a masked-LM head in transformers is an encoder even where it also has a
    causal one (BERT, RoBERTa).
    """
    if config.is_encoder_decoder:
        return "encoder-decoder"
    if config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    return "decoder"


def head_modules(model: torch.nn.Module) -> list[str]:
    """Return the names of the direct children of `model` that are its task's head.

    A head is a child with parameters of its own that is not the base model: `score`,
    `classifier`, `pre_classifier`, `qa_outputs`, `classification_head`. The output embedding of
    a language model is not one: it is pretrained.
    """
    base = getattr(model, "base_model_prefix", "")
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        name
        for name, child in model.named_children()
        if name != base and child is not output and any(True for _ in child.parameters())
    ]


def max_positions(config: Any) -> int | None:
    """Return the longest sequence in tokens that the model was built for, or None if unbounded.

    RoBERTa-like models number positions from `pad_token_id + 1` and lose that many.
    """
    if config.model_type in ("t5", "mt5", "umt5"):  # relative positions
        return None
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        positions = getattr(config.get_text_config(), name, None)
        if isinstance(positions, int) and positions > 0:
            offset = config.model_type in _OFFSET_POSITIONS
            return positions - (config.pad_token_id or 0) - 1 if offset else positions
    return None


_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "esm"}
