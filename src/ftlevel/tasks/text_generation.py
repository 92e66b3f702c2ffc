"""Text generation: continue a prompt; supervised on the completion, or on all of a plain text."""

from ftlevel.tasks.base import Task

TASK = Task(
    name="text-generation",
    auto_classes={"decoder": "AutoModelForCausalLM", "encoder-decoder": "AutoModelForSeq2SeqLM"},
    peft_types={"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"},
    headline="perplexity",
    refusals={"encoder": "Use --task text-classification, or a model such as GPT-2 or Llama."},
)
