"""What a run is made of beside its configuration, so that it goes on with the same or not at all.

Every field of the base's config.json, its tokenizer and chat template. `file_digests` has bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ftlevel.training.plan.plan import PlannedModel

CONFIG, TOKENIZER, TEMPLATE = "model.config.", "model.tokenizer", "model.chat_template"
"""Names of what `describe_model` gives; those of the config begin so."""

_SAYS_NOTHING = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures",
                 "_attn_implementation", "attn_implementation", "id2label", "label2id",
                 "quantization_config", "use_cache"}  # fmt: skip


def describe_model(model: PlannedModel) -> dict[str, Any]:
    """Return the fields of the base's config by dotted names, and digests of its tokenizer."""
    flat = dict(
        _flatten(CONFIG.rstrip("."), json.loads(model.config.to_json_string(use_diff=False)))
    )
    return flat | describe_tokenizer(model.tokenizer)


def describe_tokenizer(tokenizer: Any) -> dict[str, str]:
    """Return digests of a tokenizer and of its chat template.

    Truncation and padding are left out: some tokenizers are stored with them, as MiniLM's, each
    call sets them anew, and rows are encoded without.
    """
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        del backend["truncation"], backend["padding"]
    else:
        backend = tokenizer.get_vocab()
    return {
        TOKENIZER: _digest([backend, tokenizer.special_tokens_map]),
        TEMPLATE: _digest(getattr(tokenizer, "chat_template", None)),
    }


def _flatten(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, inner in value.items() if key not in _SAYS_NOTHING
                for pair in _flatten(f"{name}.{key}", inner)]  # fmt: skip
    return [(name, value)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()
