"""Which module of a model takes its tokens: the stack of layers under the head."""

from __future__ import annotations

from typing import Any


def find_stacks(model: Any) -> list[str]:
    """Return the name of the stack under a model's head, or of its encoder and its decoder.

    The innermost one that takes tokens: heads of OPT go past `model` to `model.decoder`.
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
    """Whether there is such a module with an embedding of its own: BERT's `encoder` has none."""
    try:
        return hasattr(model.get_submodule(name), "get_input_embeddings")
    except AttributeError:
        return False
