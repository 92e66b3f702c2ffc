"""Memory of data preparation does not grow with the number of rows."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ftlevel.config import DataConfig
from ftlevel.data.encoding.fit import LengthBounds
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.gate import gate, near_duplicates, similarity
from ftlevel.data.prepare import encoder
from ftlevel.data.prepare.dataset import prepare_data
from ftlevel.data.prepare.encoder import EncodingContext
from ftlevel.data.sources import lines
from ftlevel.tasks import TASKS, text
from run_files import ModelDir

MAX_BYTES_PER_ROW = 10
FEW, MANY = 3_000, 13_000


def encode_without_tokenizer(
    tokenizer: Any, examples: Sequence[Any], prompt_format: Any
) -> list[Encoded]:
    """Encode without the tokenizer, which takes most of the time and no memory."""
    coded = [[*map(int, f"{e.row * 7919 % 10**7:07d}"), tokenizer.eos_token_id] for e in examples]
    return [Encoded(ids, ids, e.row) for ids, e in zip(coded, examples, strict=True)]


def peak_bytes(path: Path, tokenizer: Any, rows: int) -> int:
    """Return the peak memory of Python and NumPy while preparing `rows` rows, in bytes."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            file.write(json.dumps({"text": f"{i * 7 % 1000} is {i}"}) + "\n")
            file.write("\n" if i % 1000 == 3 else "")
    config = DataConfig(dataset=str(path), cache=False)
    task, size = TASKS["text-generation"], len(tokenizer)
    context = EncodingContext(task, "decoder", tokenizer, size, LengthBounds(64), 42)
    gc.collect()
    tracemalloc.start()
    try:
        assert len(prepare_data(config, context, encoder.ignore_progress).train) == rows
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_rows(
    tmp_path: Path, tiny_model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "encode_causal", encode_without_tokenizer)
    monkeypatch.setattr(lines, "LARGE_BYTES", 0)
    # Small buffers, so that memory that grows is visible with few rows.
    monkeypatch.setattr(encoder, "BATCH", 500)
    monkeypatch.setattr(lines, "_BLOCK", 4_096)
    monkeypatch.setattr(gate, "PART_KEYS", 1_024)
    monkeypatch.setattr(similarity, "PART_KEYS", 1_024)
    monkeypatch.setattr(similarity, "_MAX_PARTS", 10**6)
    monkeypatch.setattr(gate, "MAX_COMPARED", 1_000)
    monkeypatch.setattr(similarity, "_KNOWN_WORDS", 100)
    monkeypatch.setattr(near_duplicates, "_GROUP_WORDS", 4_096)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir("qwen2"))
    peak_bytes(tmp_path / "warm.jsonl", tokenizer, 1_000)  # imports and caches
    few = peak_bytes(tmp_path / "few.jsonl", tokenizer, FEW)
    many = peak_bytes(tmp_path / "many.jsonl", tokenizer, MANY)
    assert (many - few) / (MANY - FEW) < MAX_BYTES_PER_ROW, f"{few:,} bytes, then {many:,}"
