"""Architecture kind, auto class and maximum positions of a config, and old rotary settings.

transformers 5 writes only `rope_parameters`; programs that read `rope_theta` would silently use
10,000. transformers 5 accepts files with both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ftlevel.artifacts.files import read_json
from ftlevel.models.upstream.architectures import has_masked_lm, model_classes
from ftlevel.safe_io import save_text

ModelKind = Literal["encoder", "decoder", "encoder-decoder"]


def model_kind(config: Any) -> ModelKind:
    """Returns the kind of architecture; types with a masked-LM head are encoders by default."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    if has_masked_lm(config.model_type) and not getattr(config, "is_decoder", False):
        return "encoder"
    return "decoder"


def width_of(config: Any) -> int:
    """Returns the hidden size."""
    return int(config.get_text_config().hidden_size)


TASK_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",  # before masked LM, which BART's class is, too
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)
"""transformers' auto classes of the supported tasks."""


def checkpoint_class(config: Any) -> str:
    """Returns the name of the auto class for a checkpoint, by the `architectures` of its config.

    Without `architectures`, as in .gguf files, decoders and encoder-decoders get a language-model
    class, and other models `AutoModel`.
    """
    if not config.architectures:
        defaults = {"decoder": "AutoModelForCausalLM", "encoder-decoder": "AutoModelForSeq2SeqLM"}
        return defaults.get(model_kind(config), "AutoModel")

    def is_class_of(name: str, architecture: str) -> bool:
        mapping = model_classes(name)
        return type(config) in mapping and mapping[type(config)].__name__ == architecture

    for architecture in config.architectures or ():
        for name in (*TASK_CLASSES, "AutoModelForImageTextToText"):
            if is_class_of(name, architecture):
                return name
        # BERT's pretraining head contains the masked-LM head; ELECTRA's does not.
        if (
            architecture.endswith("ForPreTraining")
            and type(config) in model_classes("AutoModelForMaskedLM")
            and config.model_type != "electra"
        ):
            return "AutoModelForMaskedLM"
    return "AutoModel"


def max_positions(config: Any) -> int | None:
    """Returns the maximum sequence length in tokens, or None if unbounded.

    RoBERTa-like models number positions from `pad_token_id + 1` and cannot use lower ones.
    """
    if config.model_type in ("t5", "mt5", "umt5"):  # relative positions
        return None
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        positions = getattr(config.get_text_config(), name, None)
        if isinstance(positions, int) and positions > 0:
            offset = config.model_type in _OFFSET_POSITIONS
            return positions - (config.pad_token_id or 0) - 1 if offset else positions
    return None


_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "esm"}


_THETA = {"gpt_neox": "rotary_emb_base"}
_PARTIAL_FACTOR = {"gpt_neox": "rotary_pct"}
_BY_LAYER = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
}
"""Model type -> transformers 4's names of the RoPE base of full and of sliding attention."""


def save_legacy_rope(model_dir: Path) -> None:
    """Add the RoPE keys that transformers 4 reads to config.json in `model_dir`."""
    path = model_dir / "config.json"
    config = read_json(path)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key, value in legacy_rope(part).items():
            part.setdefault(key, value)
    save_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def legacy_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the RoPE keys that transformers 4 reads; empty if there is no single RoPE base."""
    rope, model_type = config.get("rope_parameters") or {}, config.get("model_type", "")
    if model_type in _BY_LAYER:
        layers = [rope[name] for name in ("full_attention", "sliding_attention")]
        result = {
            key: layer["rope_theta"]
            for key, layer in zip(_BY_LAYER[model_type], layers, strict=True)
        }
        return result | (_scaling(layers[0]) if model_type == "gemma3_text" else {})
    if "rope_theta" not in rope:  # none, or one per layer type, new in transformers 5
        return {}
    result = {_THETA.get(model_type, "rope_theta"): rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        result[_PARTIAL_FACTOR.get(model_type, "partial_rotary_factor")] = rope[
            "partial_rotary_factor"
        ]
    return result | _scaling(rope)


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    if rope["rope_type"] == "default":
        return {}
    excluded = ("rope_theta", "partial_rotary_factor")
    return {"rope_scaling": {key: value for key, value in rope.items() if key not in excluded}}
