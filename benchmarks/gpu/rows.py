"""Rows of three kinds: any length, packed to one length, and under one system prompt."""

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
    """How the rows of a measurement look, and how many go into a step.

    Attributes:
        words: what is said of them in the table.
        letter: of the workload whose texts they have.
        max_length: in tokens; no row is longer.
        batch: rows a micro-batch.
        accumulate: micro-batches a step.
        fills: whether short rows become turns of one conversation until it is full.
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
    """Write the rows of `shape` to `folder`, and return the work on them.

    Args:
        shape: of SHAPES.
        quant: none or 4bit.
        model: directory of the base, with its tokenizer.
        folder: made if it is not there.
        tiny: few and short rows, in float32 on the CPU.
    """
    form = SHAPES[shape]
    steps = TINY_STEPS if tiny else STEPS
    batch = 2 if tiny else form.batch
    length = min(form.max_length, TINY_LENGTH) if tiny and form.letter == "a" else form.max_length
    wanted = steps * batch * form.accumulate
    kept = list(itertools.islice(_fitting(form, model, length), wanted))
    if len(kept) < wanted:
        raise ValueError(f"only {len(kept)} rows of {shape} fit {length} tokens; {wanted} wanted")
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row, _ in kept), encoding="utf-8")
    name = f"{'QLoRA' if quant == '4bit' else 'LoRA'}, {form.words}"
    return Work(
        name, str(model), str(rows), "text-generation", quant, batch, form.accumulate, steps,
        length, tokens=sum(tokens for _, tokens in kept), dtype="float32" if tiny else "bfloat16",
        device="cpu" if tiny else "cuda",
    )  # fmt: skip


def _fitting(form: Shape, model: Path, length: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Give the rows that are not longer than `length`, and their tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def count(turns: list[dict[str, str]]) -> int:
        return len(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False))

    turns: list[dict[str, str]] = []
    tokens = 0
    for row in read_rows(form.letter):
        longer = turns + row["messages"] if form.fills else row["messages"]
        counted = count(longer)
        if counted <= length:
            turns, tokens = longer, counted
            if form.fills:
                continue
        if turns:
            yield {"messages": turns}, tokens
        turns, tokens = [], 0
