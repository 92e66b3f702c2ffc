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
    had = _rows(model)
    wanted = read_vocabulary_size(model, directory) if had else None
    if had is None or wanted is None or wanted == had:
        return None
    model.resize_token_embeddings(wanted, mean_resizing=False)
    for layer in _embeddings(model):
        layer.weight.data[had:] = float("nan")
        if getattr(layer, "bias", None) is not None:
            layer.bias.data[had:] = 0.0
    return had


def check_new_rows(model: Any, had: int | None, directory: Path) -> None:
    """Raise InputError if new embedding rows would be random; `had` is the former number of rows.

    NaN rows of the base that the adapter replaces become the mean of the former rows (mutated).
    """
    import torch

    rows = _rows(model)
    if had is None or rows is None or rows <= had:
        return
    inputs, output = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        found = {"embedding": inputs(torch.arange(had, rows, device=inputs.weight.device))}
        if output is not None:
            width = output.weight.shape[-1]
            ones = torch.ones(1, width, dtype=output.weight.dtype, device=output.weight.device)
            found["output layer"] = output(ones)[:, had:]
        for what, values in found.items():
            if not torch.isfinite(values).all():
                raise InputError(_lost(directory, rows - had, what))
        for layer in _embeddings(model):
            weight = _plain(layer).weight
            new = weight.data[had:]
            lost = torch.isnan(new).any(-1)
            new[lost] = weight.data[:had].float().mean(0).to(weight.dtype)


def find_vocabulary_mismatch(model: Any, directory: Path) -> str | None:
    """Return why the adapter cannot share `model` with others; None if vocabulary sizes match."""
    rows, wanted = _rows(model), read_vocabulary_size(model, directory)
    if rows is None or wanted in (None, rows):
        return None
    return f"it was trained with {wanted:,} tokens, and here are {rows:,}"


def read_vocabulary_size(model: Any, directory: Path) -> int | None:
    """Return the vocabulary size in training; None if the adapter's files do not contain it."""
    shapes = _shapes(directory / WEIGHTS)
    names = {id(module): name for name, module in model.named_modules()}
    places = [f"{names[id(layer)]}." for layer in _embeddings(model) if id(layer) in names]
    whole = {
        rows
        for name, shape in shapes.items()
        for place in places
        if name.removeprefix(_PREFIX).startswith(place)
        and (rows := _rows_of(name, shape)) is not None
    }
    if whole:
        return max(whole)
    highest = max(_trained_indices(directory), default=-1) + 1
    had = _rows(model) or 0
    return highest if highest > had else None


def _rows_of(name: str, shape: list[int]) -> int | None:
    """Return the number of rows of a full matrix or of the matrix that a LoRA factor updates."""
    end = name.rpartition(".")[2]
    if end == "lora_embedding_A":
        return shape[1]
    if end != "weight" or len(shape) != 2:
        return None
    if ".lora_" in name:
        return shape[0] if ".lora_B." in name else None
    return shape[0]


def _trained_indices(directory: Path) -> Iterator[int]:
    config = read_peft_config(directory)
    for key in ("trainable_token_indices", "token_indices"):
        found = config.get(key) or []
        for indices in found.values() if isinstance(found, Mapping) else [found]:
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


def _lost(directory: Path, count: int, what: str) -> str:
    return (
        f"{directory} was trained with {count:,} more tokens than its base has, and holds no rows "
        f"of the {what} for them. They would be random. Train it again with that layer in "
        "modules_to_save, by which PEFT saves it."
    )
