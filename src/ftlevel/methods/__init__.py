"""PEFT methods: each module turns one spec of the config into one `peft` config."""

from __future__ import annotations

from ftlevel.methods import adalora, ia3, ln_tuning, lora, lycoris, orthogonal, vera
from ftlevel.methods.base import Base, Method

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
}
"""Method → how it is put onto a model; `full` is not here, it needs nothing."""

__all__ = ["METHODS", "Base", "Method"]
