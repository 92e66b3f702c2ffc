"""Rows of three kinds: any length, packed to one length, and with one system prompt."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.workloads import Work, read_rows
from transformers import AutoTokenizer


@dataclass(frozen=True)
class Shape:
    """Rows of a measurement, with the texts of workload `letter`; `words` is for the table.

    A step has `accumulate` micro-batches of `batch` rows. With `fills`, short rows are joined as
    turns of one conversation of up to `max_length` tokens.
    """

    words: str
    letter: str
    max_length: int
    batch: int
    accumulate: int
    fills: bool = False


SHAPES = {
    "ragged": Shape("docstrings of any length", "a", 2048, 8, 2),
    "2k": Shape("conversations of 2,048 tokens", "a", 2048, 2, 2, fills=True),
    "prefix": Shape("chats under one system prompt", "c", 4096, 4, 2),
}
STEPS = 12
TINY_STEPS, TINY_LENGTH = 3, 256


def build(shape: str, quant: str, model: Path, folder: Path, *, tiny: bool) -> Work:
    """Write the rows of `shape` to `folder`, and return the workload.

    Args:
        shape: a key of SHAPES.
        quant: none or 4bit.
        model: directory of the base, with its tokenizer.
        folder: output directory, created if needed.
        tiny: few and short rows, in float32 on the CPU.
    """
    row_shape = SHAPES[shape]
    steps = TINY_STEPS if tiny else STEPS
    batch = 2 if tiny else row_shape.batch
    length = (
        min(row_shape.max_length, TINY_LENGTH)
        if tiny and row_shape.letter == "a"
        else row_shape.max_length
    )
    count = steps * batch * row_shape.accumulate
    selected = list(itertools.islice(_select_rows(row_shape, model, length), count))
    if len(selected) < count:
        raise ValueError(
            f"only {len(selected)} rows of {shape} fit {length} tokens; {count} wanted"
        )
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row, _ in selected), encoding="utf-8")
    name = f"{'QLoRA' if quant == '4bit' else 'LoRA'}, {row_shape.words}"
    return Work(
        name, str(model), str(rows), "text-generation", quant, batch, row_shape.accumulate, steps,
        length, tokens=sum(tokens for _, tokens in selected),
        dtype="float32" if tiny else "bfloat16", device="cpu" if tiny else "cuda",
    )  # fmt: skip


def _select_rows(
    row_shape: Shape, model: Path, length: int
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the rows of at most `length` tokens, and their tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def count(turns: list[dict[str, str]]) -> int:
        return len(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False))

    turns: list[dict[str, str]] = []
    tokens = 0
    for row in read_rows(row_shape.letter):
        joined = turns + row["messages"] if row_shape.fills else row["messages"]
        tokens_joined = count(joined)
        if tokens_joined <= length:
            turns, tokens = joined, tokens_joined
            if row_shape.fills:
                continue
        if turns:
            yield {"messages": turns}, tokens
        turns, tokens = [], 0
