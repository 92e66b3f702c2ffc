"""What kind of transformer a config describes, and how long a sequence it takes.

Rotary positions in config.json for programs that read the form of transformers 4.

transformers 5 writes `rope_parameters` alone. Who looks for `rope_theta` finds none, takes 10,000,
and computes another model without a word. transformers 5 reads a file with both the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ftlevel.models.upstream.architectures import has_masked_lm, model_classes

ModelKind = Literal["encoder", "decoder", "encoder-decoder"]


def model_kind(config: Any) -> ModelKind:
    """Return whether `config` is of an encoder, a decoder or an encoder-decoder.

    A model type that has a masked-LM head in transformers is an encoder even where it also has a
    causal one (BERT, RoBERTa).
    """
    if config.is_encoder_decoder:
        return "encoder-decoder"
    if has_masked_lm(config.model_type):
        return "encoder"
    return "decoder"


def width_of(config: Any) -> int:
    """Return the width of the hidden states."""
    return int(config.get_text_config().hidden_size)


TASK_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)
"""transformers' auto classes of the tasks."""


def checkpoint_class(config: Any) -> str:
    """Return the auto class that a checkpoint was saved as, by its `architectures`.

    Where a config names none, as of a .gguf file, what models of its kind are for; `AutoModel`, a
    model without head, where the name is unknown.
    """
    if not config.architectures:
        usual = {
            "decoder": "AutoModelForCausalLM",
            "encoder-decoder": "AutoModelForSeq2SeqLM",
        }
        return usual.get(model_kind(config), "AutoModel")

    def is_made_by(name: str, architecture: str) -> bool:
        mapping = model_classes(name)
        return type(config) in mapping and mapping[type(config)].__name__ == architecture

    for architecture in config.architectures or ():
        for name in (*TASK_CLASSES, "AutoModelForImageTextToText"):
            if is_made_by(name, architecture):
                return name
        # BERT's pretraining head has the masked language model's in it; ELECTRA's has another.
        if (
            architecture.endswith("ForPreTraining")
            and type(config) in model_classes("AutoModelForMaskedLM")
            and config.model_type != "electra"
        ):
            return "AutoModelForMaskedLM"
    return "AutoModel"


def max_positions(config: Any) -> int | None:
    """Return the longest sequence in tokens that the model was built for, or None if unbounded.

    RoBERTa-like models number positions from `pad_token_id + 1` and lose that many.
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
_SHARE = {"gpt_neox": "rotary_pct"}
_BY_LAYER = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
}
"""Kind of model → what transformers 4 called the base of its full and of its sliding attention."""


def write_former_rope(directory: Path) -> None:
    """Write the former keys of rotary positions beside the new ones in config.json (mutated)."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key, value in former_rope(part).items():
            part.setdefault(key, value)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def former_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what transformers 4 wrote for the `rope_parameters` of a model's `config`."""
    rope, kind = config.get("rope_parameters") or {}, config.get("model_type", "")
    if kind in _BY_LAYER:
        layers = [rope[name] for name in ("full_attention", "sliding_attention")]
        former = {
            key: layer["rope_theta"] for key, layer in zip(_BY_LAYER[kind], layers, strict=True)
        }
        return former | (_scaling(layers[0]) if kind == "gemma3_text" else {})
    if "rope_theta" not in rope:  # none, or one for each kind of layer, which had no former form
        return {}
    former = {_THETA.get(kind, "rope_theta"): rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        former[_SHARE.get(kind, "partial_rotary_factor")] = rope["partial_rotary_factor"]
    return former | _scaling(rope)


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_scaling` where positions are stretched."""
    if rope["rope_type"] == "default":
        return {}
    own = ("rope_theta", "partial_rotary_factor")
    return {"rope_scaling": {key: value for key, value in rope.items() if key not in own}}
