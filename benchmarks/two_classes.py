"""Plain PEFT on two classes that are hard to tell apart: what its rates give, beside ftlevel's.

    python benchmarks/two_classes.py --rates 3e-4,1e-3,3e-3

The first lines of Python's own docstrings, 200 of classes and 200 of functions: what is scored are
400 others. Training has no ftlevel in it: transformers' model, PEFT's LoRA on every linear, AdamW,
linear to zero. `--head-rate-factor` gives the new head a rate of its own, `--warmup` a share of
warm-up.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ftlevel.data.sources.docstrings import read_module, stdlib_modules

LINEARS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def write_rows(folder: Path) -> None:
    """Write `train.jsonl` and `validation.jsonl`, each with as many classes as functions."""
    texts: dict[str, dict[str, None]] = {"class": {}, "function": {}}
    for _, file in stdlib_modules("train"):
        for item in read_module(file):
            line = item.docstring.partition("\n")[0]
            if item.kind in texts and 20 <= len(line) <= 80:
                texts[item.kind][line] = None
    shuffled = {kind: random.Random(0).sample(list(lines), 400) for kind, lines in texts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", slice(0, 200)), ("validation", slice(200, 400))):
        rows = [{"text": text, "label": kind} for pair in zip(*(t[part] for t in shuffled.values()),
                strict=True) for kind, text in zip(shuffled, pair, strict=True)]  # fmt: skip
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def read(path: Path) -> tuple[list[str], torch.Tensor]:
    """Return texts and classes as 0 and 1."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = sorted({row["label"] for row in rows})
    return [row["text"] for row in rows], torch.tensor([names.index(r["label"]) for r in rows])


def train(options: argparse.Namespace, rate: float, seed: int) -> float:
    """Train once and return the accuracy on the validation rows."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts, labels = read(options.data / "train.jsonl")
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=int(labels.max()) + 1
    )
    if options.method == "lora":
        model = get_peft_model(
            model,
            LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=LINEARS),
        )
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if ("classifier" in n) == head],
         "lr": rate * (options.head_rate_factor if head else 1)}
        for head in (False, True)
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warmup = max(round(options.steps * options.warmup), 1e-9)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (options.steps - step) / (options.steps - warmup)),
    )
    draw, order = random.Random(seed), []
    model.train()
    for _ in range(options.steps):
        if len(order) < 8:
            order = draw.sample(range(len(texts)), len(texts))
        batch, order = order[:8], order[8:]
        inputs = tokenizer([texts[i] for i in batch], padding=True, return_tensors="pt")
        model(**inputs, labels=labels[batch]).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return score(model, tokenizer, *read(options.data / "validation.jsonl"))


@torch.no_grad()
def score(model: Any, tokenizer: Any, texts: list[str], labels: torch.Tensor) -> float:
    """Return the accuracy."""
    model.eval()
    right = 0
    for at in range(0, len(texts), 64):
        inputs = tokenizer(texts[at : at + 64], padding=True, return_tensors="pt")
        right += int((model(**inputs).logits.argmax(-1) == labels[at : at + 64]).sum())
    return right / len(texts)


def main() -> None:
    """Train at every rate, and print an accuracy a line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=".models/all-MiniLM-L6-v2")
    parser.add_argument("--data", type=Path, default=Path("runs/defaults/two classes"))
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--rates", default="3e-4,1e-3,3e-3")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--head-rate-factor", type=float, default=1.0)
    parser.add_argument("--warmup", type=float, default=0.0)
    options = parser.parse_args()
    if not options.data.exists():
        write_rows(options.data)
    for rate in map(float, options.rates.split(",")):
        found = [train(options, rate, seed) for seed in range(1, options.seeds + 1)]
        print(json.dumps({"rate": rate, "accuracy": found, "mean": sum(found) / len(found)}),
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
