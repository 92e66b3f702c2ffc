"""Rotary positions in config.json for programs that read the form of transformers 4.

transformers 5 writes `rope_parameters` alone. Who looks for `rope_theta` finds none, takes 10,000,
and computes another model without a word. transformers 5 reads a file with both the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
