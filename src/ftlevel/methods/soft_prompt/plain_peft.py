"""Prompts that plain PEFT trained, put on as prompts of ours.

PEFT 0.21 gives the prompt to every step of `generate` anew in transformers 5, whose caches have
another name, and its logits are as long as prompt and text together. Its file holds the embeddings,
of P-tuning those that its encoder gave; they are all that a prompt is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftlevel.errors import InputError

TYPES = ("PROMPT_TUNING", "P_TUNING")
_KEY = "prompt_embeddings"


def put_on(base: Any, directory: Path, name: str) -> Any:
    """Return `base` with the prompt saved in `directory`, as an adapter called `name`.

    Raises:
        InputError: it is not of a language model's whole input, or not of this base.
    """
    import torch
    from peft import get_peft_model
    from safetensors.torch import load_file

    from ftlevel.methods.soft_prompt.config import SoftPromptConfig

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
