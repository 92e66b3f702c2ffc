"""Models shipped with the package, named `builtin:NAME`.

Each is a subdirectory in transformers' format. Must not import torch or transformers.
"""

from __future__ import annotations

from pathlib import Path

from ftlevel.errors import InputError, did_you_mean, join_names

MODELS: tuple[str, ...] = ("tiny-llama",)


def name_of(directory: Path) -> str:
    """Returns `builtin:NAME` of the built-in model in `directory`, or ""."""
    root = Path(__file__).resolve().parent
    path = directory.resolve()
    return f"builtin:{path.name}" if path.parent == root and path.name in MODELS else ""


def model_path(name: str) -> Path:
    """Returns the directory of `builtin:name`; raises `InputError` if unknown or incomplete."""
    if name not in MODELS:
        raise InputError(
            f"builtin:{name}: no such model in ftlevel.{did_you_mean(name, MODELS)}"
            f" Available: {join_names(f'builtin:{model}' for model in MODELS)}."
        )
    directory = Path(__file__).resolve().parent / name
    if not (directory / "model.safetensors").is_file():
        raise InputError(
            f"builtin:{name}: {directory} has no model.safetensors, so this installation is not"
            " complete. Install ftlevel again."
        )
    return directory
