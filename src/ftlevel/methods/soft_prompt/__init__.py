"""Prompt tuning and P-tuning: builds `SoftPromptConfig` for a tuner of ftlevel.

PEFT's tuner lengthens the sequence that heads, pooling and `generate` see; this one hides the
prompt from them. `load_peft_prompt` loads prompts trained with PEFT, whose files contain only the
embeddings. The submodules import peft and are imported only when needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftlevel.config.methods.soft_prompt import PromptSpec, PTuningSpec
from ftlevel.errors import InputError
from ftlevel.methods.base import VIRTUAL_TOKENS, Base, Merging, Method, StepSupport
from ftlevel.methods.facts import method_facts
from ftlevel.methods.rates import Rates
from ftlevel.methods.upstream import register_tuner


def find_stacks(model: Any) -> list[str]:
    """Return the name of the stack below the head, or those of encoder and decoder.

    Returns the innermost module with input embeddings, such as OPT's `model.decoder`.
    """
    whole = getattr(model, "base_model_prefix", "")
    root = whole if whole and hasattr(model, whole) else ""
    for parent in dict.fromkeys((root, "")):
        names = [f"{parent}.{part}".lstrip(".") for part in ("encoder", "decoder")]
        takes_tokens = [name for name in names if _takes_tokens(model, name)]
        if takes_tokens:
            return takes_tokens
    return [root] if root else []


def find_prompt_targets(model: Any) -> list[str]:
    """Return the full names of the stacks of `model` that get a prompt.

    A model without a head is named by its `ModuleList`, as PEFT cannot target the whole model.
    """
    lists = (n for n, part in model.named_modules() if type(part).__name__ == "ModuleList")
    return find_stacks(model) or [*lists][:1]


def _takes_tokens(model: Any, name: str) -> bool:
    """Return whether the module has its own input embeddings."""
    try:
        return hasattr(model.get_submodule(name), "get_input_embeddings")
    except AttributeError:
        return False


TYPES = ("PROMPT_TUNING", "P_TUNING")
_KEY = "prompt_embeddings"


def load_peft_prompt(base: Any, directory: Path, name: str) -> Any:
    """Return `base` with PEFT's prompt in `directory` as the adapter `name`.

    Raises:
        InputError: its task is not CAUSAL_LM, or it does not fit this base.
    """
    import torch
    from peft import get_peft_model
    from safetensors.torch import load_file

    from ftlevel.methods.soft_prompt.layer import SoftPromptConfig

    settings = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    if (task := settings.get("task_type")) != "CAUSAL_LM":
        raise InputError(
            f"{directory} is {settings['peft_type']} of PEFT for {task}, where the head reads "
            "virtual tokens as well, and here only those of the text. Prompts are read for "
            "CAUSAL_LM. Ask it by PEFT, or train one with --method prompt."
        )
    prompt = load_file(str(directory / "adapter_model.safetensors")).get(_KEY)
    width = base.get_input_embeddings().weight.shape[1]
    if prompt is None or prompt.dim() != 2 or prompt.shape[1] != width:
        found = "none" if prompt is None else f"{tuple(prompt.shape)}"
        raise InputError(
            f"{directory} does not fit its base model, {base.config.model_type}: its {_KEY} are "
            f"{found}, expected (tokens, {width}). Name the base that it was trained on."
        )
    config = SoftPromptConfig(
        task_type=task, num_virtual_tokens=len(prompt), random_init=True, inference_mode=True
    )
    adapted = get_peft_model(base, config, adapter_name=name)
    with torch.no_grad():
        for layer in adapted.base_model.layers():
            layer.soft_prompt_embedding[name].copy_(prompt)
    return adapted.requires_grad_(False).eval()


# These models add per-layer embeddings of token ids, which a prompt lacks.
_READ_IDS_IN_LAYERS = frozenset({"gemma3n", "gemma3n_text", "gemma4", "gemma4_text"})


def register() -> None:
    """Register the tuner of both methods in PEFT."""
    from ftlevel.methods.soft_prompt.layer import SOFT_PROMPT, SoftPromptConfig, SoftPromptModel

    register_tuner(SOFT_PROMPT, SoftPromptConfig, SoftPromptModel)


def build_prompt(spec: PromptSpec, base: Base) -> Any:
    """Return PEFT's config for prompt tuning; raises `ValueError` for text without a tokenizer."""
    ids = None
    if spec.prompt_tuning_init_text is not None:
        if base.tokenizer is None:
            raise ValueError("prompt_tuning_init TEXT needs the model's tokenizer")
        ids = base.tokenizer(spec.prompt_tuning_init_text, add_special_tokens=False)["input_ids"]
    return _config(spec, base, init_token_ids=ids, random_init=spec.prompt_tuning_init == "RANDOM")


def build_p_tuning(spec: PTuningSpec, base: Base) -> Any:
    """Return PEFT's config for P-tuning of `base`."""
    return _config(
        spec,
        base,
        encoder=spec.encoder_reparameterization_type,
        encoder_hidden_size=spec.encoder_hidden_size,
        encoder_num_layers=spec.encoder_num_layers,
        encoder_dropout=spec.encoder_dropout,
    )


def _config(spec: PromptSpec | PTuningSpec, base: Base, **fields: Any) -> Any:
    register()
    from ftlevel.methods.soft_prompt.layer import SoftPromptConfig

    return SoftPromptConfig(
        task_type=base.task_type,
        num_virtual_tokens=spec.num_virtual_tokens,
        tokens_before=1 if base.kind == "encoder" else 0,
        target_modules=base.targets,
        modules_to_save=base.heads or None,
        **fields,
    )


def find_targets(_spec: Any, model: Any) -> list[str]:
    """Return the full names of the layer stacks of `model` that get a prompt, sorted."""
    return sorted(find_prompt_targets(model))


def describe_prompt(spec: PromptSpec) -> str:
    """Return the settings of prompt tuning in one line."""
    begin = {"SAMPLE_VOCAB": "from the vocabulary", "TEXT": "from a text", "RANDOM": "random"}
    return f"{spec.num_virtual_tokens} virtual tokens, {begin[spec.prompt_tuning_init]} at first"


def describe_p_tuning(spec: PTuningSpec) -> str:
    """Return the settings of P-tuning in one line."""
    return (
        f"{spec.num_virtual_tokens} virtual tokens, computed by an "
        f"{spec.encoder_reparameterization_type}"
    )


def refuse(_spec: Any, model_config: Any, _kind: str, _task: str, _quant: str) -> str | None:
    """Return why the model does not support soft prompts and what does, or None."""
    if model_config.model_type in _READ_IDS_IN_LAYERS:
        return (
            f"{model_config.model_type} reads the ids of its tokens again in every layer, and "
            "virtual tokens have none. Use --method lora."
        )
    return None


def positions(spec: PromptSpec | PTuningSpec) -> int:
    """Return the number of model positions that the prompt uses."""
    return spec.num_virtual_tokens


def finish(model: Any) -> None:
    """Replace the encoder of a trained prompt by its output (in place)."""
    model.base_model.fold(model.active_adapter)


_STEP = StepSupport(
    packing=lambda spec: f"{spec.kind} puts virtual tokens into every row",
    workers=lambda spec: f"{spec.kind} keeps its place in the model",
)
_PROMPT = Method(
    (
        method_facts(
            "prompt",
            "embeddings before the input",
            "",
            "Lester et al., 2021, arXiv:2104.08691",
            81_920,
        ),
    ),
    rate=Rates(narrow=1e-1, wide=3e-2, source="not measured", tokens=3e-2),
    build=build_prompt,
    register=register,
    find_targets=find_targets,
    describe=describe_prompt,
    refuse=refuse,
    positions=positions,
    step=_STEP,
    merging=Merging(
        ("SOFT_PROMPT", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"),
        into_weights=False,
        why_not=lambda _: VIRTUAL_TOKENS,
    ),
    plain=dict.fromkeys(TYPES, load_peft_prompt),
)
_P_TUNING = Method(
    (
        method_facts(
            "p-tuning",
            "embeddings before the input, from a small network",
            "",
            "Liu et al., 2021, arXiv:2103.10385",
            50_425_856,
        ),
    ),
    rate=Rates(narrow=1e-2, wide=5e-3, source="not measured", kinds={"encoder-decoder": 3e-2}),
    build=build_p_tuning,
    register=register,
    find_targets=find_targets,
    describe=describe_p_tuning,
    refuse=refuse,
    positions=positions,
    finish=finish,
    continued_as="prompt",  # the saved adapter has the embeddings only
    step=_STEP,
    merging=Merging(
        ("SOFT_PROMPT", "P_TUNING"), into_weights=False, why_not=lambda _: VIRTUAL_TOKENS
    ),
)
METHODS = {"prompt": _PROMPT, "p-tuning": _P_TUNING}
