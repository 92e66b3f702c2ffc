"""Heads that AdapterHub saved beside an adapter, as modules of transformers' models.

A head is that of a transformers class ("static"), or built of a few layers ("flex"); of the latter
those are read that compute what transformers' head of the family computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ftlevel.errors import InputError, listing


@dataclass(frozen=True)
class HubHead:
    """A head, before weights load.

    Attributes:
        task: what it is for, as in `--task`; empty for a language head, of any task that writes.
        labels: names of classes or tags by index.
        options: of the task, where the head knows them.
        layers: name of a flex head's layer → the module that it is; empty for a static head.
        name: of a flex head.
    """

    task: str
    labels: list[str] = field(default_factory=list)
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)
    name: str = ""


_TASK_OF_CLASS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForCausalLM": "",
    "LMHeadModel": "",
    "ForConditionalGeneration": "",
    "ForMaskedLM": "masked-lm",
}
_TASK_OF_TYPE = {
    "classification": "text-classification",
    "multilabel_classification": "text-classification",
    "tagging": "token-classification",
    "question_answering": "question-answering",
    "causal_lm": "",
    "seq2seq_lm": "",
}
_TWO_LAYERS = {"1": "classifier.dense", "4": "classifier.out_proj"}
_OF_FIRST_TOKEN: dict[str, tuple[str, dict[str, str]]] = {
    "bert": ("tanh", {"1": "pooler.dense", "4": "classifier"}),
    "roberta": ("tanh", _TWO_LAYERS),
    "xlm-roberta": ("tanh", _TWO_LAYERS),
    "electra": ("gelu", _TWO_LAYERS),
    "deberta-v2": ("gelu", {"1": "pooler.dense", "4": "classifier"}),
    "distilbert": ("relu", {"1": "pre_classifier", "4": "classifier"}),
    "bart": ("tanh", {"1": "classification_head.dense", "4": "classification_head.out_proj"}),
}
"""Family → the activation of its classifier, and the layers of a flex head that are its modules."""
_WRAPPED = re.compile(r"\.(?:original_module|modules_to_save\.[^.]+)(?=\.)")
_OF_LAST_TOKEN = ("gpt2", "gptj", "llama", "mistral")


def read_head(settings: Mapping[str, Any]) -> HubHead:
    """Return the head that head_config.json describes.

    Raises:
        InputError: it is one that transformers' model does not have.
    """
    config = settings.get("config")
    if not isinstance(config, Mapping):
        name = str(settings.get("model_class"))
        task = next((task for end, task in _TASK_OF_CLASS.items() if name.endswith(end)), None)
        if task is None:
            raise InputError(f"model_class {name!r} of the head is not known.")
        return HubHead(task, _labels(settings) if task.endswith("classification") else [])
    kind = config.get("head_type")
    if kind not in _TASK_OF_TYPE:
        raise InputError(
            f"head_type {kind!r} is not known. Heads that are read: {listing(_TASK_OF_TYPE)}."
        )
    task = _TASK_OF_TYPE[kind]
    options = {}
    if kind == "multilabel_classification":
        options["problem_type"] = "multi_label_classification"
    labels = _labels(config) if task.endswith("classification") else []
    layers = _layers(str(settings.get("model_type")), str(kind), config) if task else {}
    return HubHead(task, labels, options, layers, str(settings.get("name")))


def _labels(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes by index, or as transformers would name them."""
    numbers: Mapping[str, int] = config.get("label2id") or {}
    count = int(config.get("num_labels") or len(numbers))
    by_number = {int(number): str(name) for name, number in numbers.items()}
    return [by_number.get(number, f"LABEL_{number}") for number in range(count)]


def _layers(family: str, kind: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Return which modules of the family's own head the layers of a flex head are.

    Raises:
        InputError: that head computes something else.
    """
    count, pooled = config.get("layers"), bool(config.get("use_pooler"))
    if kind == "question_answering" and count == 1:
        return {"1": "qa_outputs"}
    if kind == "tagging" and count == 1:
        return {"1": "score" if family in ("llama", "mistral") else "classifier"}
    if kind in ("classification", "multilabel_classification"):
        activation, layers = _OF_FIRST_TOKEN.get(family, ("", {}))
        if count == 2 and not pooled and layers and config["activation_function"] == activation:
            return layers
        if count == 1 and pooled and family in ("bert", "albert"):
            return {"1": "classifier"}
        if count == 1 and family in _OF_LAST_TOKEN and config.get("bias") is False:
            return {"1": "score"}
    keys = ("layers", "activation_function", "use_pooler", "bias")
    said = listing([f"{key} {config[key]!r}" for key in keys if key in config], most=len(keys))
    raise InputError(
        f"a head of type {kind} with {said} is not what transformers' {family} computes. Use it "
        "with adapters itself."
    )


def head_modules(head: HubHead, weights: Mapping[str, Any]) -> list[str]:
    """Return the modules that are saved with the adapter, in full; none of a language head."""
    if head.task in ("", "masked-lm"):
        return []
    names = head.layers.values() or weights
    return sorted({name.split(".")[0] for name in names})


def name_head_weights(head: HubHead, weights: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return the weights of a head by their names in `model`.

    Raises:
        InputError: they are not those of its head.
    """
    own = {_WRAPPED.sub("", name) for name in model.state_dict()}
    named = {}
    for key, tensor in weights.items():
        name = key
        if head.layers:
            layer, _, end = key.removeprefix(f"heads.{head.name}.").partition(".")
            name = f"{head.layers.get(layer, '?')}.{end}"
        found = [full for full in own if full == name or full.endswith(f".{name}")]
        if len(found) != 1:
            raise InputError(f"the head's weight {key} fits nothing in {type(model).__name__}.")
        named[found[0]] = tensor
    return named


def check_language_head(weights: Mapping[str, Any], model: Any) -> None:
    """Refuse a language head that is not the base's, which is what is used.

    Raises:
        InputError: it was trained, or is another one.
    """
    import torch

    output = model.get_output_embeddings()
    own = {name: tensor for name, tensor in model.state_dict().items() if tensor is not None}
    for key, tensor in weights.items():
        known = own.get(key)
        if known is None and output is not None and key.endswith(".weight"):
            known = output.weight
        if known is None or not torch.equal(known.cpu().float(), tensor.float()):
            raise InputError(
                f"the language head's {key} is not the base's, and an adapter of ftlevel keeps "
                "that one. Use it with adapters itself."
            )
