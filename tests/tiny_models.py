"""Tiny real models of every family and head, built from configs: two layers, hidden size 64.

The width of each linear layer is a multiple of 64, for 4-bit blocks. Noise is added to all weights,
so that no bias is zero and no norm is one, and a missing term changes the result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoConfig

from tiny_tokenizers import build_tokenizer

VOCAB = 704  # at least what every tokenizer of tiny_tokenizers uses
HIDDEN, INNER, LAYERS = 64, 128, 2
LABELS = 3

_ROWS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
CONFIGS: dict[str, dict[str, Any]] = {name: _ROWS[name] for name in _ROWS if name[0] != "_"}

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
