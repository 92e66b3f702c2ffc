"""Translation: source → target, by a decoder as prompt and completion, or by T5, mT5 and BART.

The instruction names the languages; `name_languages` writes it as the kind of model knows it.
"""

from ftlevel.task import Task
from ftlevel.tasks.text_scores import score_translations

TASK = Task(
    name="translation",
    target="text",
    auto_classes={"decoder": "AutoModelForCausalLM", "encoder-decoder": "AutoModelForSeq2SeqLM"},
    peft_types={"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"},
    headline="chrf",
    instruction="Translate the following text.",
    answer_cue="Translation:",
    generates=True,
    score_texts=score_translations,
    refusals={"encoder": "Use a decoder such as Llama, or T5 or BART."},
)


def name_languages(kind: str, source: str, target: str) -> str:
    """Return the instruction for a model of `kind`, from names of languages in English.

    An encoder-decoder gets the prefix of T5's pretraining (Raffel et al., 2020, appendix D).
    """
    if kind == "encoder-decoder":
        return f"translate {source} to {target}:"
    return f"Translate from {source} to {target}."
