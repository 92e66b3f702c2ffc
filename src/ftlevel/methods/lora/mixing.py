"""Mix LoRA adapters: exactly, by laying their matrices side by side, or by PEFT's strategies."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlevel.methods.merging import WEIGHTS, read_peft_config
from ftlevel.methods.upstream import pattern_of

_MIXTURE = "mixture"


def why_not_mixable(config: dict[str, Any]) -> str | None:
    """Return why an adapter of `config` cannot be mixed with others, or None if it can."""
    if config.get("peft_type") != "LORA":
        return f"only LoRA adapters can be mixed, and it is {config.get('peft_type')}"
    if config.get("use_dora"):
        return (
            "it is DoRA, whose magnitudes are no sum of updates, and PEFT would drop them without "
            "a word; merge it alone"
        )
    for key, what in (
        ("modules_to_save", "heads or layers that were trained in full"),
        ("trainable_token_indices", "tokens that were trained in full"),
        ("target_parameters", "updates of experts, which PEFT cannot mix"),
    ):
        if config.get(key):
            return f"it has {what} ({key}), and two of them have no sum"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        return "it has biases of its own, and two of them have no sum"
    return None


def mix_exactly(directories: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    """Write the LoRA whose update is Σ wᵢ · sᵢ · Bᵢ · Aᵢ, sᵢ being an adapter's scale.

    Its A is the wᵢ·sᵢ·Aᵢ one below the other and its B the Bᵢ side by side, so its rank is the sum
    of the ranks and its own scale is 1.
    """
    import torch
    from safetensors.torch import load_file, save_file

    mixed: dict[str, Any] = {}
    for directory, weight in zip(directories, weights, strict=True):
        config = read_peft_config(directory)
        for name, tensor in load_file(str(directory / WEIGHTS)).items():
            value = tensor.float()
            is_a = ".lora_A." in name or name.endswith(".lora_embedding_A")
            if is_a:
                value = value * (weight * scale_of(config, _module_of(name), len(value)))
            elif ".lora_B." not in name and not name.endswith(".lora_embedding_B"):
                continue  # the base of an embedding, which PEFT saves beside its update
            mixed[name] = (
                torch.cat([mixed[name], value], 0 if is_a else 1) if name in mixed else value
            )
    ranks = {_module_of(name): len(t) for name, t in mixed.items()
             if ".lora_A." in name or name.endswith(".lora_embedding_A")}  # fmt: skip
    most = max(ranks.values())
    own = {f"^{name}$".replace(".", r"\."): rank for name, rank in ranks.items() if rank != most}
    first = read_peft_config(directories[0])
    first |= {
        "r": most, "lora_alpha": most, "rank_pattern": own, "alpha_pattern": dict(own),
        "use_rslora": False, "target_modules": sorted(ranks), "layers_to_transform": None,
        "layers_pattern": None, "exclude_modules": None,
    }  # fmt: skip
    save_file(mixed, str(out / WEIGHTS), metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(first, indent=2) + "\n", encoding="utf-8")


def scale_of(config: dict[str, Any], module: str, rank: int) -> float:
    """Return what the update of `module` is multiplied by: alpha / r, or alpha / sqrt(r)."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(pattern_of(patterns, module), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _module_of(name: str) -> str:
    """Return the module that the tensor `name` of an adapter's file belongs to."""
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def mix_with_peft(
    model: Any,
    directories: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    strategy: str,
    density: float | None,
) -> None:
    """Write what PEFT's `add_weighted_adapter` makes of the adapters.

    Args:
        model: the base (mutated); its weights are not read.
        directories: of the adapters.
        weights: one for each.
        out: where the mixture is written.
        strategy: as in `--strategy`.
        density: share of entries that is kept; None is one half.

    Raises:
        ValueError: PEFT cannot mix them so, as ranks that differ by `linear`.
    """
    import torch
    from peft import PeftModel

    torch.manual_seed(0)  # dare drops at random
    names = [f"adapter_{index}" for index in range(len(directories))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(model, str(directories[0]), adapter_name=names[0])
        for name, directory in zip(names[1:], directories[1:], strict=True):
            adapted.load_adapter(str(directory), adapter_name=name)
        more: dict[str, Any] = {}
        if strategy not in ("svd", "linear"):
            more["density"] = 0.5 if density is None else density
        adapted.add_weighted_adapter(
            names, list(weights), _MIXTURE, strategy.replace("-", "_"), **more
        )
        adapted.save_pretrained(str(out), selected_adapters=[_MIXTURE], save_embedding_layers=False)
    for path in (out / _MIXTURE).iterdir():
        path.rename(out / path.name)
