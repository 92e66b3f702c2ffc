"""Methods that PEFT has and ftlevel does not train: their updates as plain LoRA, or why not."""

from __future__ import annotations

from ftlevel.methods import METHODS
from ftlevel.methods.lora.plain_form import token_rows
from ftlevel.methods.plain_form.factors import FULL_RANK, AdapterFile, Factors, PlainForm

NO_WEIGHTS = (
    "is no change of weights: what it adds is computed beside them, by the library that trained it "
    "alone. For a server, train by a method that merges, such as --method lora"
)


def tokens_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Return the trained rows of an embedding, and of the output layer that shares them."""
    return token_rows(file, "trainable_tokens_delta", file.config["token_indices"])


_OTHERS = {
    "TRAINABLE_TOKENS": PlainForm(tokens_as_lora),
    "OSF": PlainForm(never="trains the weights themselves. Merge it"),
    "HRA": PlainForm(never=FULL_RANK),
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
