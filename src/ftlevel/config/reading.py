"""Words of the field for tasks, methods and quantizations, and what they are here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TASK_WORDS = {
    "causal-lm": "text-generation", "clm": "text-generation", "sft": "text-generation",
    "chat": "text-generation", "instruct": "text-generation", "pt": "text-generation",
    "sequence-classification": "text-classification", "seq-cls": "text-classification",
    "classification": "text-classification", "sentiment-analysis": "text-classification",
    "token-cls": "token-classification", "ner": "token-classification",
    "pos": "token-classification", "tagging": "token-classification",
    "question-ans": "question-answering", "qa": "question-answering",
    "squad": "question-answering", "fill-mask": "masked-lm", "mlm": "masked-lm",
    "summarisation": "summarization", "summary": "summarization", "translate": "translation",
    "mt": "translation",
    "preferences": "preference", "dpo": "preference", "rlhf": "preference",
    "reward-model": "reward", "reward-modeling": "reward",
}  # fmt: skip
"""Another word for a task, in small letters and with dashes → ours."""

METHOD_WORDS: dict[str, dict[str, Any]] = {
    "dora": {"kind": "lora", "use_dora": True},
    "qdora": {"kind": "qlora", "use_dora": True},
    "rslora": {"kind": "lora", "use_rslora": True},
    "pissa": {"kind": "lora", "init_lora_weights": "pissa"},
    "olora": {"kind": "lora", "init_lora_weights": "olora"},
    "eva": {"kind": "lora", "init_lora_weights": "eva"},
    "loftq": {"kind": "qlora", "init_lora_weights": "loftq"},
    "prefix-tuning": {"kind": "prefix"},
    "prompt-tuning": {"kind": "prompt"},
    "ptuning": {"kind": "p-tuning"},
    "bottleneck": {"kind": "adapter"},
    "layernorm": {"kind": "ln-tuning"},
    "full-finetuning": {"kind": "full"},
}
"""Another word for a method → the fields of the method section."""

QUANT_WORDS: dict[str, dict[str, Any]] = {
    "4": {"kind": "4bit"},
    "8": {"kind": "8bit"},
    "4-bit": {"kind": "4bit"},
    "8-bit": {"kind": "8bit"},
    "int4": {"kind": "4bit"},
    "int8": {"kind": "8bit"},
    "nf4": {"kind": "4bit", "quant_type": "nf4"},
    "fp4": {"kind": "4bit", "quant_type": "fp4"},
    "no": {"kind": "none"},
    "16": {"kind": "none"},
}
"""Another word for a quantization → the fields of the quant section."""

_SECTIONS = {"method": METHOD_WORDS, "quant": QUANT_WORDS}


def normal_task(name: str) -> str:
    """Return a task's name as ftlevel writes it: with dashes, and not by another library's word."""
    task = _folded(name)
    return TASK_WORDS.get(task, task)


def in_our_words(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return `values` (section → its keys) with tasks, methods and quantizations as we call them.

    What a word says of other fields gives way to what is given for them.

    Returns:
        The values, and a line for each word that is another than ours.
    """
    read, lines = dict(values), []
    if isinstance(task := read.get("task"), str):
        read["task"] = normal_task(task)
        if read["task"] != _folded(task):
            lines.append(f"task {read['task']} ({task!r} is another word for it)")
    for section, words in _SECTIONS.items():
        given = read.get(section)
        fields = dict(given) if isinstance(given, Mapping) else {"kind": given}
        kind = fields.get("kind")
        if kind is None or isinstance(kind, bool) or not isinstance(kind, (str, int)):
            continue
        meant = words.get(_folded(str(kind)))
        if meant is not None:
            read[section] = {**meant, **{k: v for k, v in fields.items() if k != "kind"}}
            said = ", ".join(f"{section}.{key}={value}" for key, value in meant.items())
            lines.append(f"{said} ({kind!r} is another word for it)")
        elif isinstance(kind, str):
            own = _folded(kind)
            read[section] = {**fields, "kind": own} if isinstance(given, Mapping) else own
    return read, lines


def _folded(word: str) -> str:
    return word.strip().lower().replace("_", "-")
