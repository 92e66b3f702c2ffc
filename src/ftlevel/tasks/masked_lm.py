"""Masked language modelling: fill in tokens that were hidden; adapts an encoder to its texts."""

from ftlevel.task import Task

TASK = Task(
    name="masked-lm",
    target="mask",
    auto_classes={"encoder": "AutoModelForMaskedLM"},
    peft_types={},
    headline="pseudo_perplexity",
    refusals={
        "decoder": "Use --task text-generation.",
        "encoder-decoder": "Use --task text-generation with a prompt and a completion.",
    },
)
