"""Methods that PEFT has and ftlevel does not train: their updates as plain LoRA, or why not."""

from __future__ import annotations

from ftlevel.errors import InputError
from ftlevel.methods import METHODS
from ftlevel.methods.lora.plain_form import token_rows
from ftlevel.methods.plain_form.factors import FULL_RANK, AdapterFile, Factors, PlainForm

NO_WEIGHTS = (
    "is no change of weights: what it adds is computed beside them, which PEFT and ftlevel do"
)


def miss_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Return MiSS (Kang and Yin, 2024): its block repeats along the input, so A adds every r-th.

    Raises:
        InputError: it is of a form whose update depends on the weight.
    """
    import torch

    start = file.config.get("init_weights")
    if start == "bat":
        raise InputError("its update depends on the base's weight (init_weights bat). Merge it")
    found = {}
    for name in file.names("miss_block"):
        (block,) = file.take(name, "miss_block")
        shape = file.read_base(f"{name}.weight").shape
        if start == "mini":
            block = block.repeat(1, shape[0] // block.shape[1])
        a = torch.zeros(len(block), shape[1], dtype=torch.float64)
        columns = torch.arange(shape[1])
        a[columns % len(block), columns] = 1
        found[name] = Factors(a, block.T.contiguous())
    file.said.append("MiSS's blocks written as sums over the input")
    return found


def tokens_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Return the trained rows of an embedding, and of the output layer that shares them."""
    return token_rows(file, "trainable_tokens_delta", file.config["token_indices"])


_OTHERS = {
    "MISS": PlainForm(miss_as_lora),
    "TRAINABLE_TOKENS": PlainForm(tokens_as_lora),
    "OSF": PlainForm(never="trains the weights themselves. Merge it"),
    **dict.fromkeys(("C3A", "HIRA", "HRA", "SHIRA"), PlainForm(never=FULL_RANK)),
    **dict.fromkeys(
        (
            "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PROMPT_TUNING",
            "P_TUNING", "PREFIX_TUNING", "SHADOW",
        ),
        PlainForm(never=NO_WEIGHTS),
    ),
    **dict.fromkeys(("POLY", "XLORA", "LILY"), PlainForm(
        never="mixes its matrices by a router that looks at the input, which PEFT alone does")),
}  # fmt: skip

PLAIN_FORMS: dict[str, PlainForm] = _OTHERS | {
    peft_type: (
        method.merging.plain_form if method.merging.into_weights else PlainForm(never=NO_WEIGHTS)
    )
    for method in METHODS.values()
    for peft_type in method.merging.peft_types
}
"""PEFT type → its plain form. One that is not here is asked of the loaded layers."""
