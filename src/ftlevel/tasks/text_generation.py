"""Text generation: continue a prompt; supervised on the completion, or on all of a plain text."""

from ftlevel.task import Task
from ftlevel.tasks.text_scores import score_rouge

TASK = Task(
    name="text-generation",
    target="text",
    auto_classes={"decoder": "AutoModelForCausalLM", "encoder-decoder": "AutoModelForSeq2SeqLM"},
    peft_types={"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"},
    headline="perplexity",
    score_texts=score_rouge,
    refusals={
        "encoder": "Use --task masked-lm or text-classification, or a model such as GPT-2 or Llama."
    },
)
