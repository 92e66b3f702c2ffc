"""A small synthetic dataset for every task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ("argument", "parser", "module", "string", "value", "object", "default", "file")
CITIES = ("Paris", "Rome", "New York", "Berlin")


def _tagged_row(i: int) -> dict[str, Any]:
    city = CITIES[i % 4].split()
    tags = ["B-LOC", "I-LOC"][: len(city)]
    words = ["The", WORDS[i % 8], "of", *city, *([WORDS[i % 5]] * (i % 4)), "."]
    return {"tokens": words, "tags": ["O", "O", "O", *tags, *["O"] * (i % 4), "O"]}


def _question_row(i: int) -> dict[str, Any]:
    answer = f"{WORDS[i % 8]} {i}"
    filler = " ".join(WORDS[(i + k) % 8] for k in range(10 + 7 * (i % 5)))
    context = f"{filler}. The name is {answer}. {filler}."
    start = context.index(answer)
    return {
        "context": context,
        "question": "What is the name?",
        "answers": {"text": [answer], "answer_start": [start]},
    }


def _unanswerable_row(i: int) -> dict[str, Any]:
    row = _question_row(i)
    return row if i % 3 else {**row, "answers": {"text": [], "answer_start": []}}


ROWS = {
    "tags": _tagged_row,
    "span": _question_row,
    "span-v2": _unanswerable_row,
    "mask": lambda i: {"text": " ".join(WORDS[(i * k) % 8] for k in range(5, 12 + i % 6))},
    "class": lambda i: {"text": f"the {WORDS[i % 8]} " * (1 + i % 3), "label": "ab"[i % 2]},
    "multi": lambda i: {
        "text": f"the {WORDS[i % 8]} " * (1 + i % 3),
        "label": [name for k, name in enumerate(("x", "y", "z")) if i >> k & 1],
    },
    "regression": lambda i: {"text": f"the {WORDS[i % 8]} " * (1 + i % 3), "label": i / 4},
    "pair": lambda i: {
        "en": f"the {WORDS[i % 8]} {i} " * (1 + i % 2),
        "de": f"das {WORDS[i % 8]} {i} " * (1 + i % 3),
    },
}


def write(directory: Path, name: str, rows: int = 16) -> Path:
    """Write `train.jsonl` and `validation.jsonl` of the dataset `name`."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, begin, end in (("train", 0, rows), ("validation", rows, rows + 6)):
        lines = [json.dumps(ROWS[name](i)) for i in range(begin, end)]
        (directory / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return directory
