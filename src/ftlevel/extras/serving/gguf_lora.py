"""Export plain LoRA as one .gguf file for llama.cpp.

Each module has `NAME.weight.lora_a` (r, in) and `.lora_b` (out, r), with llama.cpp's NAME.
llama.cpp's scale is `adapter.lora.alpha` / r = 1. Where the base's rows are permuted, as for
Llama's queries and keys, so are the rows of B (convert_lora_to_gguf.py).
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter

from ftlevel.errors import InputError, join_names
from ftlevel.extras.serving.adapters import Writer, plan_adapters
from ftlevel.extras.serving.entry import ServedModel
from ftlevel.extras.serving.gguf_families import FAMILIES, convert, get_gguf_limitations
from ftlevel.extras.serving.gguf_file import name_map
from ftlevel.merging.normal_form import NormalForm
from ftlevel.methods.lora_conversion import Factors

_FILE = "adapter.gguf"


class GgufWriter(Writer):
    """Write and read adapter.gguf, whose metadata marks it as an adapter."""

    file: str = _FILE

    def check(self, adapter: ServedModel) -> None:
        """Raise InputError if llama.cpp computes the base differently from transformers."""
        if problems := get_gguf_limitations(adapter.ref.model_config):
            raise InputError(f"for llama.cpp, {problems[0]}")

    def write(self, path: Path, lora: NormalForm, adapter: ServedModel) -> None:
        """Write `lora`, the plain LoRA of `adapter`, into the directory `path`."""
        config = adapter.ref.model_config
        names = _names(lora, config)
        writer = GGUFWriter(str(path / _FILE), FAMILIES[config.model_type].architecture)
        writer.add_string("general.type", "adapter")
        writer.add_string("general.name", adapter.name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(lora.rank))
        for name, update in lora.factors.items():
            # Rows of B must have the order of the base's rows in the file.
            b = convert(config, names[name], update.b, is_conv1d=False)
            writer.add_tensor(f"{names[name]}.lora_a", _array(update.a))
            writer.add_tensor(f"{names[name]}.lora_b", _array(b))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def read(self, path: Path, lora: NormalForm, adapter: ServedModel) -> NormalForm:
        """Load what `write` wrote, scaled and with rows in transformers' order."""
        reader = GGUFReader(str(path / _FILE))
        tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
        alpha = reader.get_field("adapter.lora.alpha").contents()
        own_names = {
            expected: name for name, expected in _names(lora, adapter.ref.model_config).items()
        }
        factors = {}
        for key in [key for key in tensors if key.endswith(".lora_a")]:
            expected = key.removesuffix(".lora_a")
            a, b = tensors[key], tensors[f"{expected}.lora_b"] * (alpha / len(tensors[key]))
            factors[own_names[expected]] = Factors(
                a, _in_order(adapter.ref.model_config, expected, b)
            )
        return replace(lora, factors=factors)


def _names(lora: NormalForm, config: Any) -> dict[str, str]:
    """Returns module → llama.cpp's weight name; raises InputError if a module has none."""
    names = name_map(config)
    result = {
        name: names.get_name(f"{name}.weight", try_suffixes=(".weight",)) for name in lora.factors
    }
    if unsupported := [name for name, modules in result.items() if modules is None]:
        raise InputError(f"llama.cpp has no place for {join_names(unsupported, 3)}. Merge it")
    return {name: str(modules) for name, modules in result.items()}


def _in_order(config: Any, name: str, b: torch.Tensor) -> torch.Tensor:
    """Returns `b` of weight `name` with its rows in transformers' instead of llama.cpp's order."""
    numbered = torch.arange(b.shape[0], dtype=torch.float32).unsqueeze(-1)
    permutation = convert(config, name, numbered, is_conv1d=False).squeeze(-1).long()
    back = torch.empty_like(b)
    back[permutation] = b
    return back


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.float().contiguous().numpy()


plan_export = functools.partial(plan_adapters, GgufWriter(), server="llama.cpp")
"""Plan the export of one or several adapters."""
