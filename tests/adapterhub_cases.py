"""Bases, adapters and heads, with the inputs of adapterhub_figures.json.

`scripts/against_adapterhub.py` of commit a06cb43b recorded the figures with AdapterHub's package.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0}  # fmt: skip
_LLAMA = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
_T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
       "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}  # fmt: skip
_BART = {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
         "decoder_ffn_dim": 48, "max_position_embeddings": 40, "pad_token_id": 1,
         "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("AutoModelForPreTraining", SIZES),
    "roberta": ("AutoModelForMaskedLM", {**SIZES, "type_vocab_size": 1}),
    "gpt2": ("AutoModelForCausalLM", _GPT),
    "llama": ("AutoModelForCausalLM", _LLAMA),
    "t5": ("AutoModelForSeq2SeqLM", _T5),
    "bart": ("AutoModelForSeq2SeqLM", _BART),
    "distilbert": ("AutoModelForMaskedLM", {"vocab_size": 99, "dim": 32, "hidden_dim": 48,
                   "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40}),
    "electra": ("AutoModelForMaskedLM", {**SIZES, "embedding_size": 16}),
    "albert": ("AutoModelForPreTraining", {**SIZES, "embedding_size": 16}),
    "deberta-v2": ("AutoModelForMaskedLM", {**SIZES, "type_vocab_size": 0,
                   "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
                   "pos_att_type": ["p2c", "c2p"], "share_att_key": True}),
    "xlm-roberta": ("AutoModelForMaskedLM", {**SIZES, "type_vocab_size": 1}),
    "mistral": ("AutoModelForCausalLM", {**_LLAMA, "sliding_window": None}),
    "gptj": ("AutoModelForCausalLM", {**_GPT, "rotary_dim": 4}),
    "mt5": ("AutoModelForSeq2SeqLM", _T5),
    "mbart": ("AutoModelForSeq2SeqLM", _BART),
}  # fmt: skip
SEQ2SEQ = ("t5", "mt5", "bart", "mbart")
CLASSIFIER, TOKEN_CLASSIFIER = (
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)
QUESTION_ANSWERING = "AutoModelForQuestionAnswering"


@dataclass
class Case:
    """One adapter on one base, in its own directory.

    Attributes:
        number: names the directory.
        family: model type of the base.
        style: printed description.
        auto_class: of transformers, for both.
        config: class and fields of AdapterHub's configuration; None for configurations of ftlevel.
        head: settings of a flex head; None for the head of the class.
    """

    number: int
    family: str
    style: str
    auto_class: str
    config: tuple[str, dict[str, Any]] | None = None
    head: dict[str, Any] | None = None


def fill(name: str, tensor: Any, scale: float = 0.3) -> None:
    """Fill `tensor` (mutated) with values that depend on its name and the positions only.

    Values are within ±`scale`, for norms and factors around 1.
    """
    import torch

    mask = 0xFFFFFFFF
    hashed = (torch.arange(tensor.numel()) + zlib.crc32(name.encode())) * 2654435761 & mask
    hashed = (hashed ^ hashed >> 15) * 2246822519 & mask
    hashed = (hashed ^ hashed >> 13) * 3266489917 & mask
    center = float(tensor.dim() == 1 and name.endswith(("weight", "scaling", "_scale.default")))
    values = center + scale * (2 * (hashed ^ hashed >> 16).double() / mask - 1)
    with torch.no_grad():
        tensor.copy_(values.view(tensor.shape))


def create_batch(family: str) -> dict[str, Any]:
    """Return two rows of tokens, equal in both processes."""
    import torch

    ids = (torch.arange(22).view(2, 11) * 37 + 11) % 90 + 5
    ids[:, -1] = 2  # BART classifies the last EOS
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family in SEQ2SEQ:
        batch["decoder_input_ids"] = ids
    return batch


def compute_logits(model: Any, case: Case) -> Any:
    """Return the model's logits, (2, …), in evaluation."""
    import torch

    batch = create_batch(case.family)
    if case.auto_class in (CLASSIFIER, TOKEN_CLASSIFIER, QUESTION_ANSWERING):
        batch.pop("decoder_input_ids", None)
    with torch.no_grad():
        output = model.eval()(**batch)
    logits = output.start_logits if case.auto_class == QUESTION_ANSWERING else output.logits
    return logits.contiguous()
