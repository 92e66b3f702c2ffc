"""Token classification: a tag for each word, as in named entity recognition."""

from ftlevel.task import Task

_CLASS = "AutoModelForTokenClassification"

TASK = Task(
    name="token-classification",
    target="tags",
    auto_classes={"encoder": _CLASS, "decoder": _CLASS, "encoder-decoder": _CLASS},
    peft_types={"encoder": "TOKEN_CLS", "decoder": "TOKEN_CLS", "encoder-decoder": "TOKEN_CLS"},
    headline="f1",
)
