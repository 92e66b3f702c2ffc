"""PEFT methods: each module turns one spec of the config into one `peft` config."""

from __future__ import annotations

from ftlevel.methods import bottleneck, lora, prefix, soft_prompt
from ftlevel.methods.base import Base, Method
from ftlevel.methods.peft_types import ensure_registered

METHODS: dict[str, Method] = {
    "lora": lora.METHOD,
    "qlora": lora.METHOD,
    "adapter": bottleneck.METHOD,
    "prefix": prefix.METHOD,
    "prompt": soft_prompt.PROMPT,
    "p-tuning": soft_prompt.P_TUNING,
}
"""Method → how it is put onto a model; `full` is not here, it needs nothing."""

__all__ = ["METHODS", "Base", "Method", "ensure_registered"]
