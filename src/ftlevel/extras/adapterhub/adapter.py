"""Read adapters and heads of AdapterHub's `adapters` library, and convert them to the PEFT format.

A head is that of a transformers class ("static") or AdapterHub's own stack of layers ("flex"). Flex
heads are read only if they compute the same as transformers' head for that model type.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.artifacts.files import read_json_object
from ftlevel.errors import InputError, join_names
from ftlevel.extras.adapterhub.config_file import WEIGHTS, convert_config, get_hub_names
from ftlevel.models.loading import check_finite


@dataclass(frozen=True)
class HubHead:
    """Prediction head of an AdapterHub adapter, as head_config.json describes it; has no weights.

    Attributes:
        task: task of the head; empty for a language head.
        labels: class names.
        options: task options, such as `problem_type`.
        layers: of AdapterHub's flex heads, layer number → module in transformers; else empty.
        name: name of a flex head; empty for heads of transformers.
    """

    task: str
    labels: list[str]
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
"""Family → activation of the classification head, and `HubHead.layers` of a flex head."""
_WRAPPED = re.compile(r"\.(?:original_module|modules_to_save\.[^.]+)(?=\.)")
_OF_LAST_TOKEN = ("gpt2", "gptj", "llama", "mistral")


def load_head(config_dict: Mapping[str, Any]) -> HubHead:
    """Returns the head in head_config.json; raises InputError if transformers has no equal head."""
    config = config_dict.get("config")
    if not isinstance(config, Mapping):
        name = str(config_dict.get("model_class"))
        task = next((task for end, task in _TASK_OF_CLASS.items() if name.endswith(end)), None)
        if task is None:
            raise InputError(f"model_class {name!r} of the head is not known.")
        return HubHead(task, _labels(config_dict) if task.endswith("classification") else [])
    head_type = config.get("head_type")
    if head_type not in _TASK_OF_TYPE:
        raise InputError(
            f"head_type {head_type!r} is not known. Heads that are read: "
            f"{join_names(_TASK_OF_TYPE)}."
        )
    task = _TASK_OF_TYPE[head_type]
    options = {}
    if head_type == "multilabel_classification":
        options["problem_type"] = "multi_label_classification"
    labels = _labels(config) if task.endswith("classification") else []
    layers = _layers(str(config_dict.get("model_type")), str(head_type), config) if task else {}
    return HubHead(task, labels, options, layers, str(config_dict.get("name")))


def _labels(config: Mapping[str, Any]) -> list[str]:
    numbers: Mapping[str, int] = config.get("label2id") or {}
    num_labels = int(config.get("num_labels") or len(numbers))
    by_number = {int(number): str(name) for name, number in numbers.items()}
    return [by_number.get(number, f"LABEL_{number}") for number in range(num_labels)]


def _layers(family: str, head_type: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns `HubHead.layers` of a flex head; InputError if transformers has no equal head."""
    num_layers, pooled = config.get("layers"), bool(config.get("use_pooler"))
    if head_type == "question_answering" and num_layers == 1:
        return {"1": "qa_outputs"}
    if head_type == "tagging" and num_layers == 1:
        return {"1": "score" if family in ("llama", "mistral") else "classifier"}
    if head_type in ("classification", "multilabel_classification"):
        activation, layers = _OF_FIRST_TOKEN.get(family, ("", {}))
        is_same = layers and not pooled and config.get("activation_function") == activation
        if num_layers == 2 and is_same:
            return layers
        if num_layers == 1 and pooled and family in ("bert", "albert"):
            return {"1": "classifier"}
        if num_layers == 1 and family in _OF_LAST_TOKEN and config.get("bias") is False:
            return {"1": "score"}
    keys = ("layers", "activation_function", "use_pooler", "bias")
    settings = ", ".join(f"{key} {config[key]!r}" for key in keys if key in config)
    raise InputError(
        f"a head of type {head_type} with {settings} is not what transformers' {family} "
        "computes. Use it with adapters itself."
    )


def head_modules(head: HubHead, weights: Mapping[str, Any]) -> list[str]:
    """Returns the names of the head's top-level modules; empty for a language head."""
    if head.task in ("", "masked-lm"):
        return []
    return sorted({name.split(".")[0] for name in head.layers.values() or weights})


def name_head_weights(head: HubHead, weights: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Returns the head's weights by their names in `model`; InputError if one matches no module."""
    full_names = {_WRAPPED.sub("", name) for name in model.state_dict()}
    tensors = {}
    for key, tensor in weights.items():
        name = key
        if head.layers:
            layer, _, end = key.removeprefix(f"heads.{head.name}.").partition(".")
            name = f"{head.layers.get(layer, '?')}.{end}"
        matches = [full for full in full_names if full == name or full.endswith(f".{name}")]
        if len(matches) != 1:
            raise InputError(
                f"the head's weight {key} matches no module of {type(model).__name__}."
            )
        tensors[matches[0]] = tensor
    return tensors


def check_language_head(weights: Mapping[str, Any], model: Any) -> None:
    """Raise InputError if a language head's weights differ from the base model's head."""
    import torch

    output = model.get_output_embeddings()
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor is not None}
    for key, tensor in weights.items():
        expected = state.get(key)
        if expected is None and output is not None and key.endswith(".weight"):
            expected = output.weight
        if expected is None or not torch.equal(expected.cpu().float(), tensor.float()):
            raise InputError(
                f"the language head's {key} is not the base's, and an adapter of ftlevel keeps "
                "that one. Use it with adapters itself."
            )


CONFIG = "adapter_config.json"
HEAD_CONFIG = "head_config.json"
ADAPTER_FILES = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_FILES = ("model_head.safetensors", "pytorch_model_head.bin")
_HUB_NAME = re.compile(r"(.*)\.(?:adapters|\w+_text_(?:task|lang)_adapters)\.([^.]+)\.(.+)")


@dataclass(frozen=True)
class HubAdapter:
    """Adapter in AdapterHub's format, before weights load; `config_dict` is adapter_config.json."""

    directory: Path
    config_dict: dict[str, Any]
    head: HubHead | None
    head_weights: dict[str, Any]

    @property
    def base(self) -> str:
        """Name of the base model."""
        return str(self.config_dict["model_name"])

    @property
    def heads(self) -> list[str]:
        """Names of the head's modules, which PEFT saves as `modules_to_save`."""
        return head_modules(self.head, self.head_weights) if self.head else []

    def task(self, requested: str | None) -> str:
        """Returns the head's task, else `requested` or text-generation; InputError on conflict."""
        head_task = self.head.task if self.head else ""
        if head_task and requested not in (None, head_task):
            raise InputError(
                f"{self.directory} has a head for {head_task}, not for {requested}. Drop --task."
            )
        return head_task or requested or "text-generation"

    def complete(self, card: AdapterCard) -> AdapterCard:
        """Returns `card` with the labels and options of the adapter's head, if there is one."""
        if self.head is None:
            return card
        options = {**card.options, **self.head.options}
        return replace(card, labels=self.head.labels or card.labels, options=options)

    def convert(self, model: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the adapter's PEFT config for `model`, and its weights by their PEFT names.

        Raises InputError if the adapter is corrupted, unsupported, or for a different base.
        """
        from ftlevel.methods.bottleneck import get_adapter_positions, target_pattern
        from ftlevel.methods.bottleneck.layer import BottleneckConfig

        try:
            fields = convert_config(self.config_dict, model.config)
            config = BottleneckConfig(**fields, modules_to_save=self.heads or None)
            positions = get_adapter_positions(model.config)
            pattern = fields["target_modules"] or (
                positions and target_pattern(positions, config.placement)
            )
            excluded = fields["exclude_modules"] or "(?!)"
            names = (
                name
                for name, _ in model.named_modules()
                if re.fullmatch(str(pattern), name) and not re.fullmatch(excluded, name)
            )
            hub_names = get_hub_names(names, model)
            weights = _name_weights(_load_weights(self.directory, ADAPTER_FILES), hub_names, config)
            if self.head is not None and not self.heads:
                check_language_head(self.head_weights, model)
            elif self.head is not None:
                weights |= name_head_weights(self.head, self.head_weights, model)
        except (InputError, ValueError) as error:
            raise InputError(f"{self.directory}: {error}") from None
        return config, {f"base_model.model.{name}": tensor for name, tensor in weights.items()}


def is_adapterhub(directory: Path) -> bool:
    """Whether the adapter in `directory` is in AdapterHub's format, not PEFT's."""
    try:
        config_dict = read_json_object(directory / CONFIG)
    except InputError:
        return False
    return "peft_type" not in config_dict and "config" in config_dict


def load_hub_adapter(directory: Path) -> HubAdapter:
    """Load configuration and head from `directory`; raises InputError if they are invalid."""
    config_dict = read_json_object(directory / CONFIG)
    if not isinstance(config_dict.get("model_name"), str) or not config_dict["model_name"]:
        raise InputError(
            f"{directory / CONFIG} names no base model. Write it as model_name, a Hub id or a "
            "directory."
        )
    if not (directory / HEAD_CONFIG).is_file():
        return HubAdapter(directory, config_dict, None, {})
    head_config = read_json_object(directory / HEAD_CONFIG)
    try:
        head = load_head(head_config)
    except InputError as error:
        raise InputError(f"{directory / HEAD_CONFIG}: {error}") from None
    return HubAdapter(directory, config_dict, head, _load_weights(directory, HEAD_FILES))


class _Reader:
    """Reads AdapterHub's format; implements the protocol `AdapterReader`."""

    head_type = "adapterhub"
    name = "AdapterHub"
    library = "AdapterHub's adapters"
    peft_type = "BOTTLENECK"  # the only supported kind
    recognizes = staticmethod(is_adapterhub)
    read = staticmethod(load_hub_adapter)


READER = _Reader()


def _name_weights(
    weights: Mapping[str, Any], hub_names: Mapping[str, str], config: Any
) -> dict[str, Any]:
    """Returns PEFT name → weight; raises InputError for missing or unexpected weights."""
    groups: dict[str, dict[str, Any]] = {}
    unexpected = []
    for key, tensor in weights.items():
        match = _HUB_NAME.fullmatch(key)
        if match is None or match[3] not in WEIGHTS.values():
            unexpected.append(key)
        else:
            groups.setdefault(match[1], {})[match[3]] = tensor
    expected = [
        our for our in WEIGHTS if our != "bottleneck_scale" or isinstance(config.scaling, str)
    ]
    named, missing = {}, []
    for name, hub_name in hub_names.items():
        path = next((p for p in groups if p == hub_name or p.endswith(f".{hub_name}")), None)
        group = groups.pop(path) if path is not None else {}
        for our in expected:
            if WEIGHTS[our] in group:
                named[f"{name}.{our}"] = group[WEIGHTS[our]]
            else:
                missing.append(f"{name}.{our}")
    unexpected += [f"{path}.{key}" for path, group in groups.items() for key in group]
    if missing or unexpected:
        raise InputError(
            f"{len(missing):,} weights of the adapter are missing and {len(unexpected):,} match no "
            f"module of the base model, such as {[*missing, *unexpected][0]}. Use the base it was "
            f"trained on, or save it again with adapters 1.3.0."
        )
    return named


def _load_weights(directory: Path, names: tuple[str, str]) -> dict[str, Any]:
    """Load the first file of `names` that exists; raises InputError for non-finite values."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = next((directory / name for name in names if (directory / name).is_file()), None)
    if path is None:
        raise InputError(f"{directory} contains neither {names[0]} nor {names[1]}. Save it again.")
    try:
        if path.suffix == ".safetensors":
            weights = load_file(str(path))
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} contains objects other than tensors, which could run code, and is not "
            f"loaded. Save the adapter again with use_safetensors=True."
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        message = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read ({message}). Is the copy incomplete?") from None
    if not isinstance(weights, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in weights.values()
    ):
        raise InputError(f"{path} is not a table of tensors. Save it again with adapters.")
    check_finite(weights.items(), str(path))
    return dict(weights)
