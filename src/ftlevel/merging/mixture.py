"""Combine several LoRA adapters of one base into one LoRA, which is then merged like any other.

PEFT's `add_weighted_adapter` reads only A and B: the base is not loaded. With `cat`, A and B
matrices are concatenated, and B·A = Σ wᵢ sᵢ Bᵢ Aᵢ exactly.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import CARD, load_card
from ftlevel.artifacts.files import Workspace
from ftlevel.config import MergeConfig
from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError, InputError
from ftlevel.merging.merge_input import MergeInput, get_adapter_dir
from ftlevel.merging.merged_model import copy_tokenizer
from ftlevel.methods.merging import load_peft_config
from ftlevel.models.loading import build_task_model
from ftlevel.trained.adapt import get_vocab_mismatch
from ftlevel.trained.resolve import check_base, check_cached_base

_MIXTURE = "mixture"


def get_mixing_conflict(config: dict[str, Any]) -> str | None:
    """Returns why an adapter with this PEFT config cannot be mixed; None if it can."""
    if config.get("peft_type") != "LORA":
        return f"only LoRA adapters can be mixed, and it is {config.get('peft_type')}"
    if config.get("use_dora"):
        return "DoRA magnitudes cannot be added, and PEFT would drop them silently; merge it alone"
    for key, description in (
        ("modules_to_save", "heads or layers that were trained in full"),
        ("trainable_token_indices", "tokens that were trained in full"),
        ("target_parameters", "updates of experts, which PEFT cannot mix"),
    ):
        if config.get(key):
            return f"it has {description} ({key}), and two of them have no sum"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        return "it has biases of its own, and two of them have no sum"
    return None


def combine_adapters(
    model: Any,
    adapter_dirs: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    config: MergeConfig,
) -> None:
    """Combine the adapters with PEFT's `add_weighted_adapter` and save the result in `out`.

    `model` is modified, but its weights are not read. PEFT raises ValueError for adapters that the
    strategy cannot combine.
    """
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(0)  # dare drops values at random
    names = [f"adapter_{index}" for index in range(len(adapter_dirs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = PeftModel.from_pretrained(model, str(adapter_dirs[0]), adapter_name=names[0])
        for name, directory in zip(names[1:], adapter_dirs[1:], strict=True):
            peft_model.load_adapter(str(directory), adapter_name=name)
        layers = {
            path: {*module.lora_A, *module.lora_embedding_A}
            for path, module in peft_model.get_base_model().named_modules()
            if isinstance(module, LoraLayer)
        }
        for name in names:  # PEFT copies the first one's settings, which the sum does not have
            own = peft_model.peft_config[name]
            own.target_modules = {path for path, adapters in layers.items() if name in adapters}
            own.layers_to_transform = own.layers_pattern = own.exclude_modules = None
            own.use_rslora = False
            if isinstance(own.init_lora_weights, str):  # such as pissa, which reads the base
                own.init_lora_weights = True
        options: dict[str, Any] = {}
        if config.strategy not in ("cat", "svd", "linear"):
            options["density"] = 0.5 if config.density is None else config.density
        peft_model.add_weighted_adapter(
            names, list(weights), _MIXTURE, config.strategy.replace("-", "_"), **options
        )
        peft_model.save_pretrained(
            str(out), selected_adapters=[_MIXTURE], save_embedding_layers=False
        )
    for path in (out / _MIXTURE).iterdir():
        path.rename(out / path.name)


def mix(
    config: MergeConfig, inputs: MergeInput, stack: contextlib.ExitStack
) -> tuple[MergeInput, list[Choice]]:
    """Returns merge inputs with an adapter that combines those of `config`, and lines to print.

    A single adapter of weight 1 is not changed. The combined one is deleted when `stack` closes.
    Raises InputError if an adapter cannot be mixed or was trained on a different base.
    """
    weights = config.weights or [1.0] * len(config.adapters)
    if weights == [1.0]:
        return inputs, []
    adapter_dirs = [get_adapter_dir(name) for name in config.adapters]
    choices, quant = list[Choice](), inputs.quant.kind
    for name, directory in zip(config.adapters, adapter_dirs, strict=True):
        if reason := get_mixing_conflict(load_peft_config(directory)):
            raise InputError(f"{name} cannot be mixed: {reason}.")
        if (directory / CARD).is_file():
            card = load_card(directory)
            check_base(inputs.source, card, directory, "Combine adapters of one base.")
            check_cached_base(replace(inputs.ref, card=card, directory=directory))
            if (other := card.quantization.get("kind", "none")) != quant:
                message = f"{name} was trained with --quant {other}"
                choices.append(
                    Choice("base as in", f"{config.adapters[0]}: --quant {quant}", message)
                )
    base = build_task_model(inputs.ref.model_config, inputs.ref.auto_class)
    for name, directory in zip(config.adapters, adapter_dirs, strict=True):
        if mismatch := get_vocab_mismatch(base, directory):
            raise InputError(f"{name} cannot be mixed: {mismatch}. Merge it alone.")
    mixed_dir = Path(stack.enter_context(Workspace("mixture")))
    try:
        combine_adapters(
            base.float().to_empty(device="cpu"), adapter_dirs, weights, mixed_dir, config
        )
    except ValueError as error:
        raise ConfigError(
            f"--strategy {config.strategy}: {str(error).splitlines()[0].rstrip('.')}. "
            "Use --strategy cat, which takes every rank."
        ) from None
    terms = ", ".join(f"{w:g} × {n}" for w, n in zip(weights, config.adapters, strict=True))
    exactness = "the weighted sum, exactly" if config.strategy == "cat" else "not the weighted sum"
    copy_tokenizer(mixed_dir, inputs.ref.tokenizer_source)
    choices.append(Choice("mixture", terms, f"--strategy {config.strategy}: {exactness}"))
    return replace(inputs, ref=replace(inputs.ref, directory=mixed_dir)), choices
