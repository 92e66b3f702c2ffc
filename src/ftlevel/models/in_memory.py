"""Training of a model and tokenizer passed as Python objects.

A run loads the base from files several times. If a model equals the files that its `name_or_path`
names, these are loaded; any other model is saved first. The objects passed in are not changed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from ftlevel.config import ModelConfig, QuantConfig
from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError, InputError
from ftlevel.models.loading import get_vocabulary, load_config, load_tokenizer, silence_loggers
from ftlevel.models.quantization import as_quant_config, get_quantization_config, quantization_name
from ftlevel.models.sources import ModelSource, resolve_source, snapshot

_OF_NO_WEIGHT = tuple(
    """
    dtype torch_dtype transformers_version architectures use_cache pad_token_id
    quantization_config
    """.split()
)
"""Config fields that may differ without changing the model; a run sets these itself."""


@dataclass(frozen=True)
class PlacedModel:
    """Files of a model passed as an object: in `directory`, or if None, those `name` refers to."""

    name: str
    directory: Path | None
    quant: QuantConfig | None
    choice: Choice


def place_model(model: Any, tokenizer: Any, config: ModelConfig, parent_dir: Path) -> PlacedModel:
    """Returns where files of `model` are; saves them in the empty `parent_dir` if there are none.

    If `model` is None, `config` names it; if `tokenizer` is None, the model's is used. Raises
    `ConfigError` for an argument of wrong type, or if `model` and `config` both name a model.
    """
    if tokenizer is not None and not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        raise ConfigError(
            f"tokenizer= is of type {type(tokenizer).__name__}. Expected one that "
            "transformers.AutoTokenizer loaded."
        )
    if model is None:
        source = resolve_source(config.name_or_path, config.revision, config.trust_remote_code)
        return _with_tokenizer(source, tokenizer, parent_dir)
    _check_model(model, config)
    named_model = _resolve_name(str(model.name_or_path or ""), config)
    quant = _quantization(model)
    if named_model is not None and _has_same_weights(model, named_model, quant):
        return replace(_with_tokenizer(named_model, tokenizer, parent_dir), quant=quant)
    if tokenizer is None and named_model is None:
        raise ConfigError(
            f"model= was not loaded from files (name {model.name_or_path!r}), so its tokenizer "
            "is unknown. Pass tokenizer=…"
        )
    model_dir = parent_dir / _short_name(named_model.name if named_model else type(model).__name__)
    model.save_pretrained(model_dir)
    if tokenizer is None and named_model is not None:
        tokenizer = load_tokenizer(named_model)
    tokenizer.save_pretrained(model_dir)
    content = f"other weights than {named_model.name}" if named_model else "weights of no file"
    return PlacedModel(
        str(model_dir),
        model_dir,
        quant,
        Choice(
            "given model",
            f"has {content}",
            "kept as base/ in the run, which its adapter needs; the given object is not changed",
        ),
    )


def _check_model(model: Any, config: ModelConfig) -> None:
    """Raise `ConfigError` if `model` cannot be trained, or if `config` names a model, too."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model, PeftModel) or (
        isinstance(model, torch.nn.Module)
        and any(isinstance(module, BaseTunerLayer) for module in model.modules())
    ):
        raise ConfigError(
            "model= already has an adapter. Pass the model without it, or merged: "
            "model.merge_and_unload()."
        )
    if not isinstance(model, transformers.PreTrainedModel):
        raise ConfigError(
            f"model= is of type {type(model).__name__}. Expected a model of transformers, as "
            "AutoModelForCausalLM.from_pretrained gives it, or TrainConfig(model=NAME)."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError("model= has weights on the meta device, which have no values. Load them.")
    if "name_or_path" in config.model_fields_set:
        raise ConfigError(
            f"model= and {config.name_or_path} in the configuration are both given. Use one of "
            "them."
        )


def _quantization(model: Any) -> QuantConfig | None:
    quantization_config = get_quantization_config(model.config)
    if quantization_config is None:
        return None
    quant = as_quant_config(quantization_config)
    if quant is None:
        raise ConfigError(
            f"model= is quantized by {quantization_name(quantization_config)}. Of models in memory "
            "those of bitsandbytes can be trained (4 or 8 bits). Name it instead: "
            "TrainConfig(model=NAME)."
        )
    return quant


def _resolve_name(name: str, config: ModelConfig) -> ModelSource | None:
    try:
        return resolve_source(name, config.revision, config.trust_remote_code) if name else None
    except InputError:
        return None


def _with_tokenizer(source: ModelSource, tokenizer: Any, parent_dir: Path) -> PlacedModel:
    """Returns the files of `source`; if `tokenizer` differs from theirs, a copy that has it."""
    if tokenizer is None or _get_tokenizer_state(tokenizer) == _get_tokenizer_state(
        load_tokenizer(source)
    ):
        return PlacedModel(
            source.name,
            None,
            None,
            Choice(
                "given model",
                f"is {source.name}",
                "loaded from there; the given object is not changed",
            ),
        )
    if source.kind == "gguf":
        raise ConfigError(
            f"tokenizer= differs from that of {source.name}, and a .gguf file has its own. Drop "
            "it, or use a model directory."
        )
    model_dir = parent_dir / _short_name(source.name)
    shutil.copytree(snapshot(source), model_dir)
    tokenizer.save_pretrained(model_dir)
    return PlacedModel(
        str(model_dir),
        model_dir,
        None,
        Choice(
            "given tokenizer",
            f"differs from that of {source.name}",
            "kept with the model as base/ in the run",
        ),
    )


def _short_name(name: str) -> str:
    return name.removeprefix("builtin:").rstrip("/").rpartition("/")[2]


def _get_tokenizer_state(tokenizer: Any) -> tuple[Any, ...]:
    """Returns everything that affects tokenization except padding, for comparison."""
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
    return get_vocabulary(tokenizer), special, getattr(tokenizer, "chat_template", None)


def _has_same_weights(model: Any, source: ModelSource, quant: QuantConfig | None) -> bool:
    if source.kind == "gguf" or _get_config_dict(model.config) != _get_config_dict(
        load_config(source)
    ):
        return False
    state = model.state_dict()
    tensors = _quantized_tensors(model, source) if quant else _load_tensors(model, source)
    pointers: set[int] = set()
    for name, tensor in tensors:
        value = state.pop(name, None)
        if value is None:  # stored twice
            return False
        if value.shape != tensor.shape or not torch.equal(tensor.to(value.dtype), value.cpu()):
            return False
        pointers.add(value.data_ptr())
    return all(tensor.data_ptr() in pointers for tensor in state.values())  # tied weights


def _get_config_dict(config: Any) -> dict[str, Any]:
    config_dict = json.loads(json.dumps(config.to_dict(), default=str))
    return {
        k: v for k, v in config_dict.items() if k not in _OF_NO_WEIGHT and not k.startswith("_")
    }


def _load_tensors(model: Any, source: ModelSource) -> Iterator[tuple[str, Tensor]]:
    """Yields (name in `model`, tensor) of tensors in the files of `source`, loaded one by one."""
    state, prefix = model.state_dict(), f"{model.base_model_prefix}."
    for path in sorted(snapshot(source).glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dict
                names = (key, prefix + key, key.removeprefix(prefix))
                name = next((name for name in names if name in state), None)
                if name is not None:
                    yield name, file.get_tensor(key)


def _quantized_tensors(model: Any, source: ModelSource) -> Iterator[tuple[str, Tensor]]:
    floating = [p.dtype for p in model.parameters() if p.is_floating_point()]
    with silence_loggers():
        reloaded = type(model).from_pretrained(
            source.location,
            **source.arguments(),
            quantization_config=model.config.quantization_config,
            dtype=floating[0],
            device_map={"": str(model.device)},
            use_kernels=False,
        )
    state = model.state_dict()
    yield from ((name, t.cpu()) for name, t in reloaded.state_dict().items() if name in state)
