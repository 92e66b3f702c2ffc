"""What scripts/against_adapterhub.py tries: bases, adapters, heads; their numbers and inputs."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

NAME = "tried"
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0}  # fmt: skip
_LLAMA = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
_T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
       "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}  # fmt: skip
_BART = {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
         "decoder_ffn_dim": 48, "max_position_embeddings": 40, "pad_token_id": 1,
         "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("AutoModelForPreTraining", SIZES),
    "roberta": ("AutoModelForMaskedLM", {**SIZES, "type_vocab_size": 1}),
    "gpt2": ("AutoModelForCausalLM", _GPT),
    "llama": ("AutoModelForCausalLM", _LLAMA),
    "t5": ("AutoModelForSeq2SeqLM", _T5),
    "bart": ("AutoModelForSeq2SeqLM", _BART),
    "distilbert": ("AutoModelForMaskedLM", {"vocab_size": 99, "dim": 32, "hidden_dim": 48,
                   "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40}),
    "electra": ("AutoModelForMaskedLM", {**SIZES, "embedding_size": 16}),
    "albert": ("AutoModelForPreTraining", {**SIZES, "embedding_size": 16}),
    "deberta-v2": ("AutoModelForMaskedLM", {**SIZES, "type_vocab_size": 0,
                   "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
                   "pos_att_type": ["p2c", "c2p"], "share_att_key": True}),
    "xlm-roberta": ("AutoModelForMaskedLM", {**SIZES, "type_vocab_size": 1}),
    "mistral": ("AutoModelForCausalLM", {**_LLAMA, "sliding_window": None}),
    "gptj": ("AutoModelForCausalLM", {**_GPT, "rotary_dim": 4}),
    "mt5": ("AutoModelForSeq2SeqLM", _T5),
    "mbart": ("AutoModelForSeq2SeqLM", _BART),
}  # fmt: skip
SEQ2SEQ = ("t5", "mt5", "bart", "mbart")
LANGUAGE = {"bert": "AutoModelForMaskedLM", "albert": "AutoModelForMaskedLM"}

_BN = {"reduction_factor": 4}
STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "double_seq_bn": ("DoubleSeqBnConfig", {**_BN, "cross_adapter": True}),
    "double_seq_bn, no cross": ("DoubleSeqBnConfig", _BN),
    "after the attention only": ("DoubleSeqBnConfig", {**_BN, "output_adapter": False}),
    "after the feed-forward only": ("DoubleSeqBnConfig", {**_BN, "mh_adapter": False}),
    "seq_bn": ("SeqBnConfig", _BN),
    "seq_bn, leave_out [1]": ("SeqBnConfig", {**_BN, "leave_out": [1]}),
    "par_bn": ("ParBnConfig", _BN),
    "scaled_par_bn": ("ParBnConfig", {**_BN, "scaling": "learned"}),
    "AdapterPlusConfig": ("AdapterPlusConfig", {**_BN, "stochastic_depth": 0.0}),
}
RECORDED = ("double_seq_bn", "seq_bn", "par_bn", "AdapterPlusConfig")
PLACEMENTS = ("houlsby", "pfeiffer", "seq_bn", "par_bn", "parallel", "adapter_plus")
CLASSIFIER, TAGGER = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
READER = "AutoModelForQuestionAnswering"
HEADS: list[tuple[str, str, dict[str, Any] | None]] = [
    *[(family, CLASSIFIER, None) for family in ("bert", "roberta", "distilbert", "llama", "bart")],
    ("roberta", TAGGER, None),
    ("bert", READER, None),
    ("bert", CLASSIFIER, {"layers": 2}),
    ("bert", CLASSIFIER, {"layers": 1, "use_pooler": True}),
    ("albert", CLASSIFIER, {"layers": 1, "use_pooler": True}),
    ("roberta", CLASSIFIER, {"layers": 2}),
    ("xlm-roberta", CLASSIFIER, {"layers": 2}),
    ("electra", CLASSIFIER, {"layers": 2, "activation_function": "gelu"}),
    ("deberta-v2", CLASSIFIER, {"layers": 2, "activation_function": "gelu"}),
    ("distilbert", CLASSIFIER, {"layers": 2, "activation_function": "relu"}),
    ("bart", CLASSIFIER, {"layers": 2}),
    ("gpt2", CLASSIFIER, {"layers": 1, "bias": False}),
    ("llama", CLASSIFIER, {"layers": 1, "bias": False}),
    ("bert", TAGGER, {"layers": 1}),
    ("llama", TAGGER, {"layers": 1}),
    ("roberta", READER, {"layers": 1}),
]
# GPT-J has no residual of the feed-forward alone; AdapterHub's adapter after ALBERT's attention
# reads the residual, which looks like a slip: two arguments are exchanged.
REFUSED = {"gptj": ("seq_bn", "par_bn", "scaled", "AdapterPlus"),
           "albert": ("double", "after the attention", "seq_bn, leave")}  # fmt: skip
HEAD_CLASS = {CLASSIFIER: "ClassificationHead", TAGGER: "TaggingHead",
              READER: "QuestionAnsweringHead"}  # fmt: skip
LABELS = ["no", "maybe", "yes"]


@dataclass
class Case:
    """One adapter on one base, in a directory of its own.

    Attributes:
        number: names the directory.
        family: model type of the base.
        style: what is printed of it.
        auto_class: of transformers, for both.
        config: class and fields of AdapterHub's configuration; None where ftlevel makes it.
        head: settings of a flex head; None for that of the class.
    """

    number: int
    family: str
    style: str
    auto_class: str
    config: tuple[str, dict[str, Any]] | None = None
    head: dict[str, Any] | None = None


def cases(small: bool) -> Iterator[Case]:
    """Yield what `adapters` makes and ftlevel reads."""
    number = 0
    for family in list(FAMILIES)[: 6 if small else None]:
        for style, config in STYLES.items():
            if any(style.startswith(start) for start in REFUSED.get(family, ())):
                continue
            yield Case(number, family, style, _language_class(family), config)
            number += 1
    for family, auto_class, head in HEADS:
        style = "its own head" if head is None else f"flex {json.dumps(head)}"
        yield Case(number, family, style, auto_class, STYLES["seq_bn"], head)
        number += 1


def own_cases(small: bool) -> Iterator[Case]:
    """Yield what ftlevel writes and `adapters` reads."""
    number = 1000
    for family in list(FAMILIES)[: 6 if small else None]:
        for placement in PLACEMENTS:
            yield Case(number, family, placement, _language_class(family))
            number += 1
    for family, auto_class, head in HEADS:
        if head is None:
            yield Case(number, family, "seq_bn", auto_class)
            number += 1


def _language_class(family: str) -> str:
    return LANGUAGE.get(family, FAMILIES[family][0])


def fill(name: str, tensor: Any, scale: float = 0.3) -> None:
    """Fill `tensor` (mutated) with numbers that its name and their places decide, on any machine.

    They lie within ±`scale`; those of a norm or a factor, around 1.
    """
    import torch

    mask = 0xFFFFFFFF
    hashed = (torch.arange(tensor.numel()) + zlib.crc32(name.encode())) * 2654435761 & mask
    hashed = (hashed ^ hashed >> 15) * 2246822519 & mask
    hashed = (hashed ^ hashed >> 13) * 3266489917 & mask
    middle = float(tensor.dim() == 1 and name.endswith(("weight", "scaling", "_scale.default")))
    values = middle + scale * (2 * (hashed ^ hashed >> 16).double() / mask - 1)
    with torch.no_grad():
        tensor.copy_(values.view(tensor.shape))


def inputs(family: str) -> dict[str, Any]:
    """Return two rows of tokens, the same in both processes."""
    import torch

    ids = (torch.arange(22).view(2, 11) * 37 + 11) % 90 + 5
    ids[:, -1] = 2  # where BART's classifier reads
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family in SEQ2SEQ:
        batch["decoder_input_ids"] = ids
    return batch


def logits_of(model: Any, case: Case) -> Any:
    """Return the model's logits, (2, …), in evaluation."""
    import torch

    batch = inputs(case.family)
    if case.auto_class in HEAD_CLASS:
        batch.pop("decoder_input_ids", None)
    with torch.no_grad():
        made = model.eval()(**batch)
    logits = made.start_logits if case.auto_class == READER else made.logits
    return logits.contiguous()


def class_settings(case: Case) -> dict[str, Any]:
    """Return what the base's config is given for the classes of a case."""
    if case.auto_class not in (CLASSIFIER, TAGGER):
        return {}
    return {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
