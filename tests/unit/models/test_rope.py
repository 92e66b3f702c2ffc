"""config.json in the form of transformers 4 beside that of transformers 5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from export_cases import GEMMA_LINEAR, LINEAR, LLAMA_3, LONG_ROPE
from ftlevel.models.kinds import save_legacy_rope
from tiny_models import build

THETA = {"rope_type": "default", "rope_theta": 500.0}
SHARE = {**THETA, "partial_rotary_factor": 0.5}
BY_LAYER = {"full_attention": THETA, "sliding_attention": {**THETA, "rope_theta": 70.0}}
LLAMA_3_FORMER = {key: value for key, value in LLAMA_3.items() if key != "rope_theta"}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", THETA, {"rope_theta": 500.0}),
    ("qwen3_moe", THETA, {"rope_theta": 500.0}),
    ("llama", LINEAR, {"rope_theta": 10000.0,
                       "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ("llama", LLAMA_3, {"rope_theta": 10000.0, "rope_scaling": LLAMA_3_FORMER}),
    ("phi3", LONG_ROPE, {"rope_theta": 10000.0}),
    ("phi3", SHARE, {"rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    ("gpt_neox", SHARE, {"rotary_emb_base": 500.0, "rotary_pct": 0.5}),
    ("gemma3_text", BY_LAYER, {"rope_theta": 500.0, "rope_local_base_freq": 70.0}),
    ("gemma3_text", GEMMA_LINEAR, {"rope_theta": 1000000.0, "rope_local_base_freq": 20000.0,
                                   "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("modernbert", BY_LAYER, {"global_rope_theta": 500.0, "local_rope_theta": 70.0}),
    ("bert", {}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "rope", "former"), CASES)
def test_both_forms_stand_side_by_side_and_read_the_same(
    family: str, rope: dict[str, Any], former: dict[str, Any], tmp_path: Path
) -> None:
    more: dict[str, Any] = {"rope_parameters": rope} if rope else {}
    if rope is LONG_ROPE:
        more["original_max_position_embeddings"] = 256
    model = build(family, **more)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    before, read = json.loads(path.read_text()), transformers.AutoConfig.from_pretrained(tmp_path)
    save_legacy_rope(tmp_path)
    after = json.loads(path.read_text())
    added = {key: value for key, value in after.items() if key not in before}
    assert {key: value for key, value in after.items() if key in before} == before
    assert former.items() <= added.items()
    assert bool(former) == bool(added)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    now = json.loads(again.to_json_string())  # Phi-3 keeps the share of former files as well
    was = json.loads(read.to_json_string())
    assert {key: value for key, value in now.items() if key in was or key not in added} == was
    loaded = type(model).from_pretrained(tmp_path).eval()
    ids = torch.arange(10, 42)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
