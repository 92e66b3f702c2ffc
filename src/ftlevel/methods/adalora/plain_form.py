"""AdaLoRA's update as plain LoRA: B · diag(E) · A · alpha / (init_r + 1e-5).

`peft.tuners.adalora` divides by the rank it began with, also once ranks are pruned; the 1e-5 is
PEFT's. Alpha that is not positive stands for that rank.
"""

from __future__ import annotations

from ftlevel.errors import InputError, listing
from ftlevel.methods.plain_form.factors import AdapterFile, Factors


def as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Return the update of every module.

    Raises:
        InputError: biases were trained too.
    """
    config = file.config
    if config.get("bias", "none") != "none":
        raise InputError("bias is set: biases of the base were trained. Merge it")
    first = config["init_r"]
    scale = (config["lora_alpha"] if config["lora_alpha"] > 0 else first) / (first + 1e-5)
    found = {}
    for name in file.names("lora_E"):
        e, a, b = file.take(name, "lora_E", "lora_A", "lora_B")
        found[name] = Factors(a * e, b * scale)
    ranks = sorted({own.rank for own in found.values()})
    file.said.append(
        f"singular values and scale {scale:.3g} (AdaLoRA) folded in; ranks left "
        f"{listing(map(str, ranks), 6)}"
    )
    return found
