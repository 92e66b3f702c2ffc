"""Summarization: document → summary, by a decoder as prompt and completion, or by T5 and BART."""

from ftlevel.task import Task
from ftlevel.tasks.text_scores import score_rouge

TASK = Task(
    name="summarization",
    target="text",
    auto_classes={"decoder": "AutoModelForCausalLM", "encoder-decoder": "AutoModelForSeq2SeqLM"},
    peft_types={"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"},
    headline="rougeL",
    instruction="Summarize the following text.",
    answer_cue="Summary:",
    generates=True,
    score_texts=score_rouge,
    refusals={"encoder": "Use a decoder such as Llama, or T5 or BART."},
)
