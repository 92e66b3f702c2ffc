"""The four workloads: rows, model and settings.

Rows come from the standard library of the Python that runs (`builtin:docstrings`) and, for
classification, from `data/wordnet-supersense`. A workload has as many rows as its steps need, and a
run is one epoch over them, so every tool sees the same rows in any order.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftlevel.data.sources.docstrings import load_docstrings

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(os.environ.get("FTLEVEL_MODELS") or ROOT / ".models")
SMOLLM2 = MODELS / "SmolLM2-135M-Instruct"
MINILM = MODELS / "all-MiniLM-L6-v2"
SUPERSENSE = ROOT / "data" / "wordnet-supersense" / "train.jsonl"

SYSTEM = """You write the first line of docstrings for a Python code base that many people maintain.

Rules of the house:
- Write one sentence in the imperative mood, as in "Return the number of open files", and end it
with a full stop. Do not write "This function returns" or "Returns".
- Say what the caller gets or what changes, not how it is done. Names of private helpers, of
variables and of data structures do not belong into the first line.
- Keep to seventy-two characters where you can. If a thing needs a second sentence, leave it to the
paragraph below, which somebody else writes.
- Use the words of the domain: a request is a request and not a message; a path is a path and not a
string. If the text that you are given uses a wrong word, use the right one.
- Mention units, and whether bounds are included, if a number comes in or goes out.
- Never praise the code, never apologise for it, and never address the reader.
- Where a value is optional, say what happens without it only if that is the function's point.
- Exceptions are listed further down in the docstring; leave them out, unless raising one is all
that the function does.
- British and American spelling both occur in this code base; follow the text that you are given.

You are given the remaining paragraphs of a docstring. Answer with its first line and nothing else.
Questions that follow are about further functions of the same module, under the same rules."""


@dataclass(frozen=True)
class Work:
    """One workload: `rows` is a JSONL file with `messages`, or with `text` and `label`.

    A step has `accumulate` micro-batches of `batch` rows, each of at most `max_length` tokens; all
    rows have `tokens`. The learning rate is constant.
    """

    name: str
    model: str
    rows: str
    task: str
    quant: str
    batch: int
    accumulate: int
    steps: int
    max_length: int
    tokens: int = 0
    dtype: str = "bfloat16"
    device: str = "cpu"
    learning_rate: float = 2e-4
    seed: int = 42

    def write(self, path: Path, **fields: Any) -> None:
        """Write the fields and `fields` to a JSON file, for the scripts on a Python API."""
        path.write_text(json.dumps({**asdict(self), **fields}), encoding="utf-8")

    def packs(self) -> tuple[int, int]:
        """Return rows per micro-batch and micro-batches per step for a tool that packs rows.

        Packed rows have `max_length` tokens; their number keeps the tokens per step, and with them
        the number of steps and the losses, close to those of unpacked rows.
        """
        rows = max(1, round(self.tokens / self.steps / self.max_length))
        accumulate = -(-rows // max(self.batch, 1))
        return -(-rows // accumulate), accumulate


def build(letter: str, folder: Path, steps: int, model: Path | None = None, **fields: Any) -> Work:
    """Write the rows of workload `letter` (a, b, c or d) to `folder`, and return the workload.

    Raises:
        FileNotFoundError: a model or data set does not exist.
    """
    rows = folder / "rows.jsonl"
    base = model or (MINILM if letter == "d" else SMOLLM2)
    name, task, quant, batch, accumulate, max_length = {
        "a": ("a: docstrings, LoRA", "text-generation", "none", 4, 2, 512),
        "b": ("b: docstrings, QLoRA", "text-generation", "4bit", 4, 2, 512),
        "c": ("c: chats, shared system prompt", "text-generation", "none", 4, 4, 1024),
        "d": ("d: classification", "text-classification", "none", 32, 1, 128),
    }[letter]
    if not base.is_dir():
        raise FileNotFoundError(f"{base} is not there. Run: python scripts/fetch_models.py")
    work = Work(name, str(base), str(rows), task, quant, batch, accumulate, steps, max_length)
    rows_with_length = list(
        itertools.islice(_select_rows(letter, work), steps * batch * accumulate)
    )
    steps = len(rows_with_length) // (batch * accumulate)
    rows_with_length = rows_with_length[: steps * batch * accumulate]
    rows.write_text(
        "".join(json.dumps(row) + "\n" for row, _ in rows_with_length), encoding="utf-8"
    )
    tokens = sum(length for _, length in rows_with_length)
    return Work(**{**asdict(work), "steps": steps, "tokens": tokens, **fields})


def count_weights(model: Path, *, has_head: bool) -> tuple[int, int]:
    """Return the number of weights of the blocks' linear layers, and of the language head.

    Args:
        model: directory of the base; no weight is read.
        has_head: whether it is trained as a language model.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        shapes = AutoModel.from_config(config).state_dict()
    blocks = sum(
        weight.numel()
        for name, weight in shapes.items()
        if weight.dim() == 2 and re.search(r"\.\d+\.", name)
    )
    return blocks, config.vocab_size * config.hidden_size if has_head else 0


def _select_rows(letter: str, work: Work) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the rows within the workload's maximum length, and their tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    for row in read_rows(letter):
        if "text" in row:
            length = len(tokenizer(row["text"])["input_ids"])
        else:
            ids = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
            length = len(ids)
        if length <= work.max_length:
            yield row, length


def read_rows(letter: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a workload, of any length."""
    if letter == "c":
        return _chats()
    if letter == "d":
        return _texts()
    return (
        {"messages": [_user(row["prompt"]), _assistant(row["completion"])]}
        for row in load_docstrings("generation", "train")
    )


def _chats() -> Iterator[dict[str, Any]]:
    """Yield conversations of two turns under one system prompt of about 300 tokens."""
    rows = [r for r in load_docstrings("summarization", "train") if len(r["document"]) <= 240]
    for first, second in zip(rows[::2], rows[1::2], strict=False):
        turns = [
            turn
            for row in (first, second)
            for turn in (_user(row["document"]), _assistant(row["summary"]))
        ]
        yield {"messages": [{"role": "system", "content": SYSTEM}, *turns]}


def _texts() -> Iterator[dict[str, Any]]:
    if not SUPERSENSE.is_file():
        raise FileNotFoundError(
            f"{SUPERSENSE} is not there. Run: python scripts/build_data.py wordnet-supersense"
        )
    for line in SUPERSENSE.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
