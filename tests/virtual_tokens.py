"""Tiny models with virtual tokens, for any family and head."""

from __future__ import annotations

from typing import Any

from ftlevel.methods import METHODS, Base
from ftlevel.models.kinds import model_kind
from ftlevel.models.module_tree import get_heads
from ftlevel.trained.adapt import apply_method
from tiny_models import build

TASK_TYPES = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "seqcls": "SEQ_CLS",
    "tokcls": "TOKEN_CLS",
    "qa": "QUESTION_ANS",
    "mlm": None,
}


def describe_base(spec: Any, model: Any, head: str) -> Base:
    """Return the description of `model` for a method."""
    has_new_head = head in ("seqcls", "tokcls", "qa")
    return Base(
        config=model.config,
        architecture=model_kind(model.config),
        task_type=TASK_TYPES[head],
        targets=METHODS[spec.kind].default_target_modules(spec, model),
        heads=get_heads(model) if has_new_head else [],
        fan_in_fan_out=False,
        total_steps=2,
    )


def adapt(spec: Any, family: str, head: str, model: Any = None) -> Any:
    """Return a tiny model with the adapter of `spec`, in eval mode."""
    model = build(family, head) if model is None else model
    return apply_method(model, spec, describe_base(spec, model, head)).eval()
