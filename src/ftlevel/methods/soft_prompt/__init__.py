"""Prompt tuning and P-tuning: builds `SoftPromptConfig` for a tuner of ftlevel.

With PEFT's tuner, heads, pooling and `generate` see a longer sequence; this tuner hides the prompt
from them. `load_peft_prompt` loads prompts trained with PEFT, whose files contain only the
embeddings. The submodules import peft and are imported only when needed.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

from ftlevel.artifacts.files import read_json
from ftlevel.config.methods.other import PromptSpec, PTuningSpec
from ftlevel.errors import InputError
from ftlevel.methods.base import VIRTUAL_TOKEN_STEP, VIRTUAL_TOKENS, Base, MergeInfo, Method
from ftlevel.methods.rates import Rates
from ftlevel.methods.support_table import single_row


def get_layer_stacks(model: Any) -> list[str]:
    """Returns names of modules: the model without its head, or its encoder and decoder.

    Each is the innermost module with input embeddings, such as OPT's `model.decoder`.
    """
    prefix = getattr(model, "base_model_prefix", "")
    prefixed = prefix if prefix and hasattr(model, prefix) else ""
    for parent in dict.fromkeys((prefixed, "")):
        names = [f"{parent}.{part}".lstrip(".") for part in ("encoder", "decoder")]
        with_embeddings = [name for name in names if _has_embeddings(model, name)]
        if with_embeddings:
            return with_embeddings
    return [prefixed] if prefixed else []


def get_prompt_modules(model: Any) -> list[str]:
    """Returns the names of the modules of `model` that get a prompt.

    If the model has no head, that is its `ModuleList` of layers: PEFT cannot target a whole model.
    """
    lists = (n for n, part in model.named_modules() if type(part).__name__ == "ModuleList")
    return get_layer_stacks(model) or [*lists][:1]


def _has_embeddings(model: Any, name: str) -> bool:
    try:
        return hasattr(model.get_submodule(name), "get_input_embeddings")
    except AttributeError:
        return False


TYPES = ("PROMPT_TUNING", "P_TUNING")
_KEY = "prompt_embeddings"


def load_peft_prompt(base: Any, path: Path, name: str) -> Any:
    """Returns `base` with a prompt trained with PEFT's tuner, from `path`, as adapter `name`.

    Raises `InputError` if the prompt's task is not CAUSAL_LM, or the prompt does not fit `base`.
    """
    import torch
    from peft import get_peft_model
    from safetensors.torch import load_file

    from ftlevel.methods.soft_prompt.layer import SoftPromptConfig

    config_dict = read_json(path / "adapter_config.json")
    if (task := config_dict.get("task_type")) != "CAUSAL_LM":
        raise InputError(
            f"{path} is {config_dict['peft_type']} of PEFT for {task}, where the head reads "
            "virtual tokens as well, and here only those of the text. Prompts are read for "
            "CAUSAL_LM. Use it with PEFT, or train one with --method prompt."
        )
    prompt = load_file(str(path / "adapter_model.safetensors")).get(_KEY)
    width = base.get_input_embeddings().weight.shape[1]
    if prompt is None or prompt.dim() != 2 or prompt.shape[1] != width:
        shape = "none" if prompt is None else f"{tuple(prompt.shape)}"
        raise InputError(
            f"{path} does not fit its base model, {base.config.model_type}: its {_KEY} are "
            f"{shape}, expected (tokens, {width}). Name the base that it was trained on."
        )
    config = SoftPromptConfig(
        task_type=task, num_virtual_tokens=len(prompt), random_init=True, inference_mode=True
    )
    peft_model = get_peft_model(base, config, adapter_name=name)
    with torch.no_grad():
        for layer in peft_model.base_model.layers():
            layer.soft_prompt_embedding[name].copy_(prompt)
    return peft_model.requires_grad_(False).eval()


# These models add per-layer embeddings of token ids, and a prompt has no ids.
_READ_IDS_IN_LAYERS = frozenset({"gemma3n", "gemma3n_text", "gemma4", "gemma4_text"})


class SoftPrompt(Method):
    """Base class of prompt tuning and P-tuning."""

    tuner = "ftlevel.methods.soft_prompt.layer"
    step = VIRTUAL_TOKEN_STEP

    def get_error(self, spec: Any, config: Any, *_: str) -> str | None:
        """Returns why the model does not support soft prompts and which method to use, or None."""
        if config.model_type not in _READ_IDS_IN_LAYERS:
            return None
        return (
            f"{config.model_type} reads the ids of its tokens again in every layer, and virtual "
            "tokens have none. Use --method lora."
        )

    def default_target_modules(self, spec: Any, model: Any) -> list[str]:
        """Returns the names, sorted, of the modules of `model` that get a prompt."""
        return sorted(get_prompt_modules(model))

    def positions(self, spec: PromptSpec | PTuningSpec) -> int:
        """Returns the length of the prompt."""
        return spec.num_virtual_tokens

    def _config(self, spec: PromptSpec | PTuningSpec, base: Base, **fields: Any) -> Any:
        from ftlevel.methods.soft_prompt.layer import SoftPromptConfig

        return SoftPromptConfig(
            task_type=base.task_type,
            num_virtual_tokens=spec.num_virtual_tokens,
            tokens_before=1 if base.architecture == "encoder" else 0,
            target_modules=base.targets,
            modules_to_save=base.heads or None,
            **fields,
        )


class PromptTuning(SoftPrompt):
    """Prompt tuning: the embeddings of the prompt are parameters."""

    info = single_row(
        "prompt", "embeddings before the input", "", "Lester et al., 2021, arXiv:2104.08691", 81_920
    )
    rate = Rates(
        1e-1, large=3e-2, source="not measured", by_architecture={"encoder": 3e-2}, tokens=3e-2
    )
    merge_info = MergeInfo(
        ("SOFT_PROMPT", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"),
        into_weights=False,
        get_error=lambda _: VIRTUAL_TOKENS,
    )
    peft_loaders = MappingProxyType(dict.fromkeys(TYPES, load_peft_prompt))

    def format_spec(self, spec: PromptSpec) -> str:
        """Returns length and initialization of the prompt as text."""
        names = {"SAMPLE_VOCAB": "from the vocabulary", "TEXT": "from a text", "RANDOM": "random"}
        initial = names[spec.prompt_tuning_init]
        return f"{spec.num_virtual_tokens} virtual tokens, {initial} at first"

    def build(self, spec: PromptSpec, base: Base) -> Any:
        """Returns `SoftPromptConfig`; raises `ValueError` if a prompt text has no tokenizer."""
        ids, text = None, spec.prompt_tuning_init_text
        if text is not None:
            if base.tokenizer is None:
                raise ValueError("prompt_tuning_init TEXT needs the model's tokenizer")
            ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        is_random = spec.prompt_tuning_init == "RANDOM"
        return self._config(spec, base, init_token_ids=ids, random_init=is_random)


class PTuning(SoftPrompt):
    """P-tuning: an MLP or LSTM computes the embeddings of the prompt during training."""

    info = single_row(
        "p-tuning",
        "embeddings before the input, from a small network",
        "",
        "Liu et al., 2021, arXiv:2103.10385",
        50_425_856,
    )
    rate = Rates(
        small=1e-2, large=5e-3, source="not measured", by_architecture={"encoder-decoder": 3e-2}
    )
    resume_method = "prompt"  # the saved adapter has the embeddings only
    merge_info = MergeInfo(
        ("SOFT_PROMPT", "P_TUNING"), into_weights=False, get_error=lambda _: VIRTUAL_TOKENS
    )

    def format_spec(self, spec: PTuningSpec) -> str:
        """Returns length and encoder of the prompt as text."""
        encoder = spec.encoder_reparameterization_type
        return f"{spec.num_virtual_tokens} virtual tokens, computed by an {encoder}"

    def build(self, spec: PTuningSpec, base: Base) -> Any:
        """Returns the `SoftPromptConfig` for `spec` and the layer stacks of `base`."""
        return self._config(
            spec,
            base,
            encoder=spec.encoder_reparameterization_type,
            encoder_hidden_size=spec.encoder_hidden_size,
            encoder_num_layers=spec.encoder_num_layers,
            encoder_dropout=spec.encoder_dropout,
        )

    def finish(self, model: Any) -> None:
        """Replace the encoder of the trained prompt in `model` (modified) by its output."""
        model.base_model.fold(model.active_adapter)


METHODS = {"prompt": PromptTuning(), "p-tuning": PTuning()}
