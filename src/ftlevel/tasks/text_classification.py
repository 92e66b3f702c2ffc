"""Text classification: one label a text, several, or a number (regression)."""

from ftlevel.task import Task

_CLASS = "AutoModelForSequenceClassification"

TASK = Task(
    name="text-classification",
    target="class",
    auto_classes={"encoder": _CLASS, "decoder": _CLASS, "encoder-decoder": _CLASS},
    peft_types={"encoder": "SEQ_CLS", "decoder": "SEQ_CLS", "encoder-decoder": "SEQ_CLS"},
    headline="accuracy",
)
