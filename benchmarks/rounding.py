"""What LoRA learns in bfloat16 beside float32, and how PEFT's order of sums differs from ours.

    python scripts/fetch_models.py && python scripts/build_data.py wordnet-define
    python benchmarks/rounding.py --steps 30 --rate 2e-4

Three runs on the same rows: in float32, in bfloat16, and in bfloat16 by PEFT's layers (--no-fast).
Each adapter is loaded by plain PEFT, which scores rows that none was trained on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

WAYS = {
    "float32": ("--dtype", "float32"),
    "bfloat16": ("--dtype", "bfloat16"),
    "bfloat16, PEFT's layers": ("--dtype", "bfloat16", "--no-fast"),
}
MODEL = Path(".models/SmolLM2-135M-Instruct")
ROWS = Path("data/wordnet-define")


def train(way: str, steps: int, rate: float, folder: Path) -> list[float]:
    """Train into `folder`, and return the loss of every step in nats."""
    command = [
        sys.executable, "-m", "ftlevel", "train", "--model", str(MODEL), "--dataset",
        str(ROWS / "train.jsonl"), "--max-steps", str(steps), "--learning-rate", str(rate),
        "--logging-steps", "1", "--output-dir", str(folder), "--quiet", *WAYS[way],
    ]  # fmt: skip
    subprocess.run(command, check=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def score(adapter: Path, dtype: torch.dtype, count: int) -> float:
    """Return the loss per target in nats of plain PEFT, in `dtype`, on `count` other rows."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
    model = PeftModel.from_pretrained(model, adapter).eval()
    total, targets = 0.0, 0
    for line in (ROWS / "validation.jsonl").read_text().splitlines()[:count]:
        row = json.loads(line)
        asked = [{"role": "user", "content": f"{row['instruction']}\n{row['input']}"}]
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        prompt, answer = (
            tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, row["output"])
        )
        with torch.no_grad():
            scores = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        wanted = torch.tensor(answer)
        total += functional.cross_entropy(scores.float(), wanted, reduction="sum").item()
        targets += len(answer)
    return total / targets


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--rows", type=int, default=48, help="that are scored")
    asked = parser.parse_args()
    print("| trained in | step 2 | last 5 steps | by PEFT in float32 | in bfloat16 |")
    print("|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as work:
        for number, way in enumerate(WAYS):
            run = Path(work) / str(number)
            losses = train(way, asked.steps, asked.rate, run)
            found = [
                score(run / "adapter", dtype, asked.rows)
                for dtype in (torch.float32, torch.bfloat16)
            ]
            cells = [losses[1], sum(losses[-5:]) / len(losses[-5:]), *found]
            print(f"| {way} | {' | '.join(f'{cell:.3f}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
    main()
