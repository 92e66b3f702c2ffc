"""Find the layer stacks that receive a model's tokens."""

from __future__ import annotations

from typing import Any


def find_stacks(model: Any) -> list[str]:
    """Return the name of the stack below the head, or those of encoder and decoder.

    Returns the innermost module with input embeddings, such as OPT's `model.decoder`.
    """
    whole = getattr(model, "base_model_prefix", "")
    root = whole if whole and hasattr(model, whole) else ""
    for parent in dict.fromkeys((root, "")):
        names = [f"{parent}.{part}".lstrip(".") for part in ("encoder", "decoder")]
        takes_tokens = [name for name in names if _takes_tokens(model, name)]
        if takes_tokens:
            return takes_tokens
    return [root] if root else []


def _takes_tokens(model: Any, name: str) -> bool:
    """Return whether the module has its own input embeddings."""
    try:
        return hasattr(model.get_submodule(name), "get_input_embeddings")
    except AttributeError:
        return False
