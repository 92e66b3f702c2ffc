"""The normal form of an adapter: plain LoRA on the unchanged base, W + B·A with scale 1.

It is computed from the adapter's file by a formula of the PEFT method. For other methods,
`serving.adapters` probes the loaded layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlevel.artifacts.files import write_json
from ftlevel.errors import InputError, join_names
from ftlevel.methods import METHODS
from ftlevel.methods.lora_conversion import (
    FULL_RANK,
    OUTPUT_LAYERS,
    PREFIX,
    AdapterFile,
    Factors,
    LoraConversion,
    convert_token_rows,
)
from ftlevel.methods.merging import WEIGHTS
from ftlevel.models.upstream.architectures import tied_names
from ftlevel.trained.adapt import get_vocab_mismatch
from ftlevel.weights.checkpoint import Checkpoint

NO_WEIGHTS = (
    "does not change weights and needs the library that trained it. For a server, train a method "
    "that can be merged, such as --method lora"
)


def tokens_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Returns module name → LoRA factors of trained token rows (embedding, tied output layer)."""
    return convert_token_rows(file, "trainable_tokens_delta", file.config["token_indices"])


_OTHERS = {
    "TRAINABLE_TOKENS": LoraConversion(tokens_as_lora),
    "OSF": LoraConversion(error="trains the weights themselves. Merge it"),
    "HRA": LoraConversion(error=FULL_RANK),
    **dict.fromkeys(
        (
            "ADAPTION_PROMPT",
            "CARTRIDGE",
            "CPT",
            "MULTITASK_PROMPT_TUNING",
            "PROMPT_TUNING",
            "P_TUNING",
            "PREFIX_TUNING",
            "SHADOW",
        ),
        LoraConversion(error=NO_WEIGHTS),
    ),
    **dict.fromkeys(
        ("POLY", "XLORA", "LILY"),
        LoraConversion(
            error="mixes its matrices by a router that looks at the input, which PEFT alone does"
        ),
    ),
}

PLAIN_FORMS: dict[str, LoraConversion] = _OTHERS | {
    peft_type: (
        method.merge_info.lora_conversion
        if method.merge_info.into_weights
        else LoraConversion(error=NO_WEIGHTS)
    )
    for method in METHODS.values()
    for peft_type in method.merge_info.peft_types
}
"""PEFT type → its plain form. For types that are not listed the loaded layers are probed."""


_BASE = ".base_layer."


@dataclass(frozen=True)
class NormalForm:
    """Adapter as plain LoRA on the unchanged base: W + B · A with scale 1.

    Attributes:
        factors: module → LoRA matrices A and B of its update, float64; all have the same rank.
        kept: tensor name → tensor of a module that was trained in full.
        computed_from: what the factors were computed from, such as `its file`.
    """

    factors: dict[str, Factors]
    kept: dict[str, Any]
    notes: list[str]
    computed_from: str = "its file"

    @property
    def rank(self) -> int:
        """Rank of every update; LoRA's alpha equals it."""
        return next(iter(self.factors.values())).rank

    @property
    def whole_modules(self) -> list[str]:
        """Names of the modules that were trained in full."""
        return sorted({name.rpartition(".")[0] for name in self.kept})

    @property
    def vocab_modules(self) -> list[str]:
        """Names of adapted embeddings and output layers."""
        return sorted(
            name
            for name, update in self.factors.items()
            if update.is_embedding or name.endswith(OUTPUT_LAYERS)
        )

    def on_every_layer(self, model: Any) -> NormalForm:
        """Returns a copy with zero updates added for layers adapted in only some of the blocks."""
        import torch

        layer_names = {name.rpartition(".")[2] for name in self.factors}
        zeros: dict[str, Factors] = {}
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in layer_names and name not in self.factors:
                weight = getattr(module, "weight", None)
                if weight is None or weight.dim() != 2:
                    continue
                rows, columns = weight.shape
                if type(module).__name__ == "Conv1D":
                    rows, columns = columns, rows
                zeros[name] = Factors(
                    torch.zeros(self.rank, columns, dtype=torch.float64),
                    torch.zeros(rows, self.rank, dtype=torch.float64),
                )
        if not zeros:
            return self
        note = (
            f"zeros written for {len(zeros):,} modules that were not adapted, such as {min(zeros)}"
        )
        return replace(self, factors=self.factors | zeros, notes=[*self.notes, note])


def get_plain_form(config: Mapping[str, Any]) -> LoraConversion:
    """Returns how to convert `config`'s PEFT type to plain LoRA; InputError if impossible."""
    peft_type = str(config.get("peft_type"))
    form = PLAIN_FORMS.get(peft_type, LoraConversion())
    if form.error:
        raise InputError(f"PEFT type {peft_type} {form.error}")
    return form


def compute_normal_form(
    adapter_dir: Path, config: Mapping[str, Any], base: Checkpoint, limit: int
) -> NormalForm | None:
    """Convert an adapter's file to plain LoRA; None if its method has no conversion formula.

    Raises InputError if no plain LoRA is equivalent, or its rank is above `limit`.
    """
    convert = get_plain_form(config).from_file
    file = load_adapter_file(adapter_dir, config, base)
    if convert is None:
        return None
    return build_normal_form(convert(file), file, limit, "its file")


def load_adapter_file(
    adapter_dir: Path, config: Mapping[str, Any], base: Checkpoint
) -> AdapterFile:
    """Load the adapter's tensors, named as in the base; InputError if they do not fit the base."""
    from safetensors.torch import load_file

    if mismatch := get_vocab_mismatch(base.model, adapter_dir):
        raise InputError(f"{mismatch}, and no server adds rows to a base. Merge it")
    tensors = {
        key.removeprefix(PREFIX): tensor
        for key, tensor in load_file(str(adapter_dir / WEIGHTS)).items()
    }
    for name in [name for name in tensors if _BASE in f".{name}"]:
        weight = base.read(name.replace(_BASE, "."))
        if weight.shape != tensors[name].shape or not weight.float().equal(
            tensors.pop(name).float()
        ):
            raise InputError(f"its file contains another {name.replace(_BASE, '.')}. Merge it")
    tied: dict[str, list[str]] = {}
    for target, source in tied_names(base.model).items():
        tied.setdefault(source.rpartition(".")[0], []).append(target.rpartition(".")[0])
    return AdapterFile(config, tensors, base.read, tied)


def is_whole(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the tensor `name` is in a module of `modules_to_save`, by PEFT's suffix match."""
    module_names = tuple(config.get("modules_to_save") or ())
    names = name.split(".")
    return any(".".join(names[:count]).endswith(module_names) for count in range(1, len(names)))


def build_normal_form(
    factors: dict[str, Factors], file: AdapterFile, limit: int, computed_from: str
) -> NormalForm:
    """Returns the plain LoRA with `factors` and the fully trained modules that remain in `file`.

    Raises InputError if a remaining tensor does not fit plain LoRA or a rank is above `limit`.
    """
    remaining = [name for name in file.tensors if not is_whole(name, file.config)]
    if remaining:
        raise InputError(
            f"its file contains {join_names(remaining, 2)}, which plain LoRA does not support"
        )
    if not factors:
        raise InputError("it changes no linear and no embedding")
    ranks = {name: update.rank for name, update in factors.items()}
    rank = max(ranks.values())
    if rank > limit:
        name = max(ranks, key=lambda key: ranks[key])
        raise InputError(
            f"the update of {name} needs rank {rank:,}, above --max-rank {limit}, which can be as "
            "high as the server supports. Merge it"
        )
    notes = list(file.notes)
    if len(set(ranks.values())) > 1:
        notes.append(f"ranks {join_names(map(str, sorted(set(ranks.values()))), 6)} → {rank}")
    return NormalForm(
        {name: update.padded(rank) for name, update in sorted(factors.items())},
        dict(file.tensors),
        notes,
        computed_from,
    )


def save_normal_form(
    output_dir: Path, normal_form: NormalForm, peft_config: Mapping[str, Any], base_name: str
) -> None:
    """Save `normal_form` (a plain LoRA) in PEFT format and float32.

    `peft_config` is the adapter_config.json that the adapter was saved with; `base_name` is the Hub
    id or path of the base.
    """
    from safetensors.torch import save_file

    tensors = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in normal_form.kept.items()}
    for name, update in normal_form.factors.items():
        first, second = _keys(name, update)
        tensors[first], tensors[second] = (
            update.a.float().contiguous(),
            update.b.float().contiguous(),
        )
    save_file(tensors, str(output_dir / WEIGHTS), {"format": "pt"})
    config = {key: peft_config.get(key) for key in ("task_type", "revision")} | {
        "peft_type": "LORA",
        "base_model_name_or_path": base_name,
        "r": normal_form.rank,
        "lora_alpha": normal_form.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(normal_form.factors),
        "modules_to_save": peft_config.get("modules_to_save") if normal_form.kept else None,
        "fan_in_fan_out": bool(peft_config.get("fan_in_fan_out")),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    write_json(output_dir / "adapter_config.json", config)


def load_normal_form(output_dir: Path, normal_form: NormalForm) -> NormalForm:
    """Returns a copy of `normal_form` with the tensors in `output_dir` in place of its own."""
    from safetensors.torch import load_file

    tensors = load_file(str(output_dir / WEIGHTS))
    factors = {}
    for name, update in normal_form.factors.items():
        first, second = _keys(name, update)
        factors[name] = Factors(tensors.pop(first), tensors.pop(second), update.is_embedding)
    full_tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return replace(normal_form, factors=factors, kept=full_tensors)


def _keys(name: str, update: Factors) -> tuple[str, str]:
    middle, suffix = ("embedding_", "") if update.is_embedding else ("", ".weight")
    first, second = (f"{PREFIX}{name}.lora_{middle}{x}{suffix}" for x in "AB")
    return first, second
