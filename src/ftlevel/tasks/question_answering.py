"""Extractive question answering: the span of a context that answers a question."""

from ftlevel.task import Task

_CLASS = "AutoModelForQuestionAnswering"

TASK = Task(
    name="question-answering",
    target="span",
    auto_classes={"encoder": _CLASS, "decoder": _CLASS, "encoder-decoder": _CLASS},
    peft_types=dict.fromkeys(("encoder", "decoder", "encoder-decoder"), "QUESTION_ANS"),
    headline="f1",
)
