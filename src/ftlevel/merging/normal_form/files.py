"""The normal form as PEFT's files, in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ftlevel.artifacts.files import write_json
from ftlevel.merging.normal_form.form import NormalForm
from ftlevel.methods.merging import WEIGHTS
from ftlevel.methods.plain_form.factors import PREFIX, Factors


class Named(Protocol):
    """What the files name beside the tensors."""

    @property
    def peft_config(self) -> dict[str, Any]:
        """The adapter_config.json that it was saved with."""

    @property
    def base_name(self) -> str:
        """The base: a Hub id, or where it lies."""


def write_normal(place: Path, form: NormalForm, entry: Named) -> None:
    """Write `form` into the directory `place`, in the names that PEFT gives."""
    from safetensors.torch import save_file

    tensors = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in form.kept.items()}
    for name, own in form.factors.items():
        first, second = _keys(name, own)
        tensors[first], tensors[second] = own.a.float().contiguous(), own.b.float().contiguous()
    save_file(tensors, str(place / WEIGHTS), {"format": "pt"})
    old = entry.peft_config
    config = {key: old.get(key) for key in ("task_type", "revision")} | {
        "peft_type": "LORA",
        "base_model_name_or_path": entry.base_name,
        "r": form.rank,
        "lora_alpha": form.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(form.factors),
        "modules_to_save": old.get("modules_to_save") if form.kept else None,
        "fan_in_fan_out": bool(old.get("fan_in_fan_out")),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    write_json(place / "adapter_config.json", config)


def read_normal(place: Path, form: NormalForm) -> NormalForm:
    """Return what the files in `place` hold; the modules are those of `form`."""
    from safetensors.torch import load_file

    tensors = load_file(str(place / WEIGHTS))
    factors = {}
    for name, own in form.factors.items():
        first, second = _keys(name, own)
        factors[name] = Factors(tensors.pop(first), tensors.pop(second), own.is_embedding)
    kept = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return replace(form, factors=factors, kept=kept)


def _keys(name: str, own: Factors) -> tuple[str, str]:
    middle, end = ("embedding_", "") if own.is_embedding else ("", ".weight")
    first, second = (f"{PREFIX}{name}.lora_{middle}{x}{end}" for x in "AB")
    return first, second
