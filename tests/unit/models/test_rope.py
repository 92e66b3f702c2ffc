"""Tests that config.json can hold the RoPE fields of transformers 4 and of transformers 5."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

from export_cases import GEMMA_LINEAR, LINEAR, LLAMA_3, LONG_ROPE
from ftlevel.models.kinds import save_legacy_rope
from tiny_models import build

THETA = {"rope_type": "default", "rope_theta": 500.0}
PARTIAL = {**THETA, "partial_rotary_factor": 0.5}
BY_LAYER = {"full_attention": THETA, "sliding_attention": {**THETA, "rope_theta": 70.0}}
LLAMA_3_LEGACY = {key: value for key, value in LLAMA_3.items() if key != "rope_theta"}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", THETA, {"rope_theta": 500.0}),
    ("qwen3_moe", THETA, {"rope_theta": 500.0}),
    ("llama", LINEAR, {"rope_theta": 10000.0,
                       "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ("llama", LLAMA_3, {"rope_theta": 10000.0, "rope_scaling": LLAMA_3_LEGACY}),
    ("phi3", LONG_ROPE, {"rope_theta": 10000.0}),
    ("phi3", PARTIAL, {"rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    ("gpt_neox", PARTIAL, {"rotary_emb_base": 500.0, "rotary_pct": 0.5}),
    ("gemma3_text", BY_LAYER, {"rope_theta": 500.0, "rope_local_base_freq": 70.0}),
    ("gemma3_text", GEMMA_LINEAR, {"rope_theta": 1000000.0, "rope_local_base_freq": 20000.0,
                                   "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("modernbert", BY_LAYER, {"global_rope_theta": 500.0, "local_rope_theta": 70.0}),
    ("bert", {}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "rope", "legacy"), CASES)
def test_save_legacy_rope_adds_fields_and_keeps_config(family, rope, legacy, tmp_path):
    def load_fields():
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        return json.loads(path.read_text()), json.loads(config.to_json_string())

    fields = {"rope_parameters": rope} if rope else {}
    if rope is LONG_ROPE:
        fields["original_max_position_embeddings"] = 256
    model = build(family, **fields)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    stored, loaded = load_fields()
    save_legacy_rope(tmp_path)
    stored_after, loaded_after = load_fields()
    added = {key: value for key, value in stored_after.items() if key not in stored}
    assert stored_after == {**stored, **added}
    assert legacy.items() <= added.items()
    assert bool(legacy) == bool(added)
    # Phi-3 also keeps the legacy partial_rotary_factor
    extra = {key: value for key, value in loaded_after.items() if key in added.keys() - loaded}
    assert loaded_after == {**loaded, **extra}
    ids = torch.arange(10, 42)[None]
    with torch.no_grad():
        reloaded = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(reloaded(ids).logits, model(ids).logits)
