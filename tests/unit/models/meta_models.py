"""Models without weights, built on the meta device from the tiny configs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from unit.models.tiny_configs import TINY

AUTO = {
    "text-generation": "AutoModelForCausalLM",
    "summarization": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}


def tiny_config(family: str, variant: int = 0, **settings: Any) -> Any:
    return transformers.AutoConfig.for_model(family, **{**TINY[family][variant], **settings})


def has_model(family: str, task: str) -> bool:
    mapping = getattr(transformers, AUTO[task])._model_mapping
    return type(tiny_config(family)) in mapping.keys()  # noqa: SIM118 - not a dict


def build(family: str, task: str, variant: int = 0, device: str = "meta") -> nn.Module:
    config = tiny_config(family, variant)
    with torch.device(device):
        return getattr(transformers, AUTO[task]).from_config(config)
