"""Adapters whose vocabulary size differs from the base's.

PEFT saves the resized embeddings, or only the trained rows, with the adapter. The base must be
resized to the same size first. New rows that the file lacks would be random, and are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftlevel.errors import InputError
from ftlevel.methods.merging import read_peft_config

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def resize_vocabulary(model: Any, directory: Path) -> int | None:
    """Resize the embeddings of `model` (mutated) to the vocabulary size of the adapter.

    New rows are NaN until `check_new_rows`. Returns the former number of rows; None if unchanged.
    """
    former_rows = _rows(model)
    requested = read_vocabulary_size(model, directory) if former_rows else None
    if former_rows is None or requested is None or requested == former_rows:
        return None
    model.resize_token_embeddings(requested, mean_resizing=False)
    for layer in _embeddings(model):
        layer.weight.data[former_rows:] = float("nan")
        if getattr(layer, "bias", None) is not None:
            layer.bias.data[former_rows:] = 0.0
    return former_rows


def check_new_rows(model: Any, former_rows: int | None, directory: Path) -> None:
    """Raise InputError if embedding rows after the first `former_rows` would be random.

    NaN rows of the base that the adapter replaces become the mean of the former rows (mutated).
    """
    import torch

    rows = _rows(model)
    if former_rows is None or rows is None or rows <= former_rows:
        return
    inputs, output = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        outputs = {
            "embedding": inputs(torch.arange(former_rows, rows, device=inputs.weight.device))
        }
        if output is not None:
            width = output.weight.shape[-1]
            ones = torch.ones(1, width, dtype=output.weight.dtype, device=output.weight.device)
            outputs["output layer"] = output(ones)[:, former_rows:]
        for layer_name, values in outputs.items():
            if not torch.isfinite(values).all():
                raise InputError(
                    f"{directory} was trained with {rows - former_rows:,} more tokens than its "
                    f"base has, and has no rows of the {layer_name} for them. They would be "
                    f"random. Train again with that layer in modules_to_save."
                )
        for layer in _embeddings(model):
            weight = _plain(layer).weight
            new = weight.data[former_rows:]
            is_unset = torch.isnan(new).any(-1)
            new[is_unset] = weight.data[:former_rows].float().mean(0).to(weight.dtype)


def find_vocabulary_mismatch(model: Any, directory: Path) -> str | None:
    """Return why the adapter cannot share `model` with others; None if vocabulary sizes match."""
    rows, requested = _rows(model), read_vocabulary_size(model, directory)
    if rows is None or requested in (None, rows):
        return None
    return f"it was trained with {requested:,} tokens, and here are {rows:,}"


def read_vocabulary_size(model: Any, directory: Path) -> int | None:
    """Read the vocabulary size in training; None if the adapter's files do not contain it."""
    names = {id(module): name for name, module in model.named_modules()}
    prefixes = tuple(f"{names[id(layer)]}." for layer in _embeddings(model) if id(layer) in names)
    sizes = [
        rows
        for name, shape in _shapes(directory / WEIGHTS).items()
        if name.removeprefix(_PREFIX).startswith(prefixes)
        and (rows := _rows_of(name, shape)) is not None
    ]
    if sizes:
        return max(sizes)
    highest = max(_trained_indices(directory), default=-1) + 1
    base_rows = _rows(model) or 0
    return highest if highest > base_rows else None


def _rows_of(name: str, shape: list[int]) -> int | None:
    """Return the number of rows of a full matrix or of the matrix that a LoRA factor updates."""
    suffix = name.rpartition(".")[2]
    if suffix == "lora_embedding_A":
        return shape[1]
    if suffix != "weight" or len(shape) != 2 or (".lora_" in name and ".lora_B." not in name):
        return None
    return shape[0]


def _trained_indices(directory: Path) -> Iterator[int]:
    config = read_peft_config(directory)
    for key in ("trainable_token_indices", "token_indices"):
        value = config.get(key) or []
        for indices in value.values() if isinstance(value, Mapping) else [value]:
            yield from indices


def _shapes(path: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _rows(model: Any) -> int | None:
    get = getattr(model, "get_input_embeddings", None)
    layer = get() if get is not None else None
    weight = getattr(layer, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _embeddings(model: Any) -> list[Any]:
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [layer for layer in layers if layer is not None]


def _plain(layer: Any) -> Any:
    """Return the base layer inside an adapter's layer."""
    for name in ("token_adapter", "original_module", "base_layer"):
        inner = getattr(layer, name, None)
        if inner is not None:
            return _plain(inner)
    return layer
