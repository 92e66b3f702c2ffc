"""Combine several LoRA adapters of one base into one LoRA, which is then merged like any other.

With `cat`, A and B matrices are concatenated, and B·A = Σ wᵢ sᵢ Bᵢ Aᵢ exactly. Other strategies
call PEFT's `add_weighted_adapter`, which reads only A and B: the base is not loaded.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import CARD, load_card
from ftlevel.artifacts.files import Workspace, write_json
from ftlevel.config import MergeConfig
from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError, InputError
from ftlevel.merging.merge_input import MergeInput, get_adapter_dir
from ftlevel.merging.merged_model import copy_tokenizer
from ftlevel.methods.lora_conversion import get_scale
from ftlevel.methods.merging import WEIGHTS, load_peft_config
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


def concatenate_adapters(adapter_dirs: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    """Save the LoRA with the update Σ wᵢ · sᵢ · Bᵢ · Aᵢ: weights wᵢ, scales sᵢ of the adapters.

    A stacks wᵢ·sᵢ·Aᵢ by rows, B concatenates Bᵢ by columns. The ranks are added; the scale is 1.
    """
    import torch
    from safetensors.torch import load_file, save_file

    mixed: dict[str, Any] = {}
    for directory, weight in zip(adapter_dirs, weights, strict=True):
        config = load_peft_config(directory)
        for name, tensor in load_file(str(directory / WEIGHTS)).items():
            value = tensor.float()
            if is_a := _is_a(name):
                value = value * (weight * get_scale(config, _module_of(name), len(value)))
            elif ".lora_B." not in name and not name.endswith(".lora_embedding_B"):
                continue  # PEFT saves the base embedding with its update
            mixed[name] = (
                torch.cat([mixed[name], value], 0 if is_a else 1) if name in mixed else value
            )
    ranks = {_module_of(name): len(t) for name, t in mixed.items() if _is_a(name)}
    max_rank = max(ranks.values())
    rank_pattern = {
        f"^{name}$".replace(".", r"\."): rank for name, rank in ranks.items() if rank != max_rank
    }
    first = load_peft_config(adapter_dirs[0])
    first |= {
        "r": max_rank,
        "lora_alpha": max_rank,
        "rank_pattern": rank_pattern,
        "alpha_pattern": dict(rank_pattern),
        "use_rslora": False,
        "target_modules": sorted(ranks),
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
    }
    save_file(mixed, str(out / WEIGHTS), metadata={"format": "pt"})
    write_json(out / "adapter_config.json", first)


def _is_a(name: str) -> bool:
    return ".lora_A." in name or name.endswith(".lora_embedding_A")


def _module_of(name: str) -> str:
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def mix_with_peft(
    model: Any,
    adapter_dirs: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    strategy: str,
    density: float | None,
) -> None:
    """Combine the adapters with PEFT's `add_weighted_adapter` and save the result in `out`.

    `model` is modified, but its weights are not read. A `density` of None means 0.5. PEFT raises
    ValueError for adapters that the strategy cannot combine.
    """
    import torch
    from peft import PeftModel

    torch.manual_seed(0)  # dare drops values at random
    names = [f"adapter_{index}" for index in range(len(adapter_dirs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = PeftModel.from_pretrained(model, str(adapter_dirs[0]), adapter_name=names[0])
        for name, directory in zip(names[1:], adapter_dirs[1:], strict=True):
            peft_model.load_adapter(str(directory), adapter_name=name)
        options: dict[str, Any] = {}
        if strategy not in ("svd", "linear"):
            options["density"] = 0.5 if density is None else density
        peft_model.add_weighted_adapter(
            names, list(weights), _MIXTURE, strategy.replace("-", "_"), **options
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
    if config.strategy == "cat":
        concatenate_adapters(adapter_dirs, weights, mixed_dir)
    else:
        model = base.to_empty(device="cpu")
        try:
            mix_with_peft(model, adapter_dirs, weights, mixed_dir, config.strategy, config.density)
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
