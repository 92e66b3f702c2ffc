"""PEFT methods: each module turns one spec of the config into one `peft` config."""

from __future__ import annotations

from ftlevel.methods import (
    adalora,
    bottleneck,
    ia3,
    ln_tuning,
    lora,
    lycoris,
    orthogonal,
    prefix,
    soft_prompt,
    vera,
)
from ftlevel.methods.base import Base, Method
from ftlevel.methods.peft_types import ensure_registered

METHODS: dict[str, Method] = {
    "lora": lora.METHOD,
    "qlora": lora.METHOD,
    "adalora": adalora.METHOD,
    "ia3": ia3.METHOD,
    "vera": vera.METHOD,
    "oft": orthogonal.OFT,
    "boft": orthogonal.BOFT,
    "loha": lycoris.LOHA,
    "lokr": lycoris.LOKR,
    "ln-tuning": ln_tuning.METHOD,
    "adapter": bottleneck.METHOD,
    "prefix": prefix.METHOD,
    "prompt": soft_prompt.PROMPT,
    "p-tuning": soft_prompt.P_TUNING,
}
"""Method → how it is put onto a model; `full` is not here, it needs nothing."""

__all__ = ["METHODS", "Base", "Method", "ensure_registered"]
