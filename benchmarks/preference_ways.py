"""What pairs teach after supervised training, and without it: accuracy, and what is written then.

    python scripts/fetch_models.py smollm2
    python scripts/build_data.py docstring-pairs
    python benchmarks/preference_ways.py --losses dpo,kto,orpo --out runs/ways      # half an hour

SmolLM2 learns the preferred summaries (two epochs); `dpo` and `kto` go on from there, `orpo` begins
at the base; each for three epochs of 160 pairs, 16 a step, LoRA r 8 on every linear. On 40 test
pairs, by transformers alone: the share whose preferred answer has gained more than the other since
then, how likely both are, and ROUGE-L of summaries that are written greedily, against the preferred
ones. Intervals are of 95 %: Wilson's for shares, by resampling rows (1,000 draws, seed 0) for
means. Runs that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer

from ftlevel import TrainConfig, train
from ftlevel.trained.load import load_ref
from ftlevel.trained.model_ref import resolve_model

MODEL = Path(".models/SmolLM2-135M-Instruct")
AFTER = {"orpo": False, "simpo": False, "cpo": False}
"""Losses without a reference, which need no supervised run before."""
RATE = {"orpo": None, "simpo": None, "cpo": None}
"""Theirs is ftlevel's own; the others have the recipe's 2e-4."""


def make(data: Path, place: Path, loss: str | None) -> Path:
    """Train the supervised run, or one of `loss`, and return its directory."""
    out = place / (loss or "sft")
    if (out / "summary.json").exists():
        return out
    sections: dict[str, Any] = {"data": {"dataset": str(data)}}
    if loss is None:
        sections["data"]["columns"] = {"prompt": "prompt", "completion": "chosen"}
        sections |= {"model": {"name_or_path": str(MODEL)}, "train": {"num_train_epochs": 2}}
    else:
        begins = {"adapter": str(place / "sft")} if AFTER.get(loss, True) else None
        sections |= {
            "task": "preference", "preference": {"loss": loss},
            "model": begins or {"name_or_path": str(MODEL)},
            "train": {"num_train_epochs": 3, "learning_rate": RATE.get(loss, 2e-4),
                      "per_device_train_batch_size": 16},
        }  # fmt: skip
    sections["train"] |= {"eval_strategy": "no", "predict_with_generate": False}
    train(TrainConfig(output={"dir": str(out), "overwrite": True}, **sections))
    return out


def write(run: Path | str, rows: list[dict[str, str]]) -> list[float]:
    """Return ROUGE-L of what a run or a model writes for each row."""
    trained = load_ref(resolve_model(str(run), device="cpu"), device="cpu")
    scorer, scores = RougeScorer(["rougeL"]), []
    for row in rows:
        asked = trained.tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            ids = trained.model.generate(**asked, max_new_tokens=48, do_sample=False)
        text = trained.tokenizer.decode(
            ids[0, asked["input_ids"].shape[1] :], skip_special_tokens=True
        )
        scores.append(scorer.score(row["chosen"], text)["rougeL"].fmeasure)
    return scores


def likelihoods(run: Path | str, rows: list[dict[str, str]]) -> list[tuple[float, float, float]]:
    """Return how likely both answers of each row are, in nats, and the first's gain a token.

    They are computed row by row with the chat template and transformers' own logits.
    """
    trained, found = load_ref(resolve_model(str(run), device="cpu"), device="cpu"), []
    for row in rows:
        sums, means = [], []
        for key in ("chosen", "rejected"):
            asked = [{"role": "user", "content": row["prompt"]}]
            talk = [*asked, {"role": "assistant", "content": row[key]}]
            ids, before = (
                trained.tokenizer.apply_chat_template(
                    turns, add_generation_prompt=opens, return_tensors="pt", return_dict=True
                )["input_ids"]
                for turns, opens in ((talk, False), (asked, True))
            )
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                logits = trained.model(input_ids=ids).logits[0, :-1].float()
            told = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[before.shape[1] - 1 :, 0]
            sums.append(float(told.sum()))
            means.append(float(told.mean()))
        found.append((*sums, means[0] - means[1]))
    return found


def interval(values: list[float]) -> str:
    """Return a mean with its interval."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(1000))
    return f"{statistics.fmean(values):.2f} ({means[25]:.2f}–{means[974]:.2f})"


def share(value: float, count: int) -> str:
    """Return a share of `count` rows with its interval."""
    z = 1.96
    middle = (value + z**2 / (2 * count)) / (1 + z**2 / count)
    root = math.sqrt(value * (1 - value) / count + z**2 / (4 * count**2))
    half = z / (1 + z**2 / count) * root
    return f"{value:.2f} ({max(middle - half, 0):.2f}–{min(middle + half, 1):.2f})"


def main() -> None:
    """Train, evaluate and print Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--losses", default="dpo,kto,orpo")
    parser.add_argument("--data", type=Path, default=Path("data/docstring-pairs"))
    parser.add_argument("--out", type=Path, default=Path("runs/ways"))
    told = parser.parse_args()
    lines = (told.data / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    print("| | told right | likelier a token | preferred, nats | rejected, nats | ROUGE-L |\n"
          "|---|---|---|---|---|---|")  # fmt: skip
    sft = make(told.data, told.out, None)
    before = {name: likelihoods(place, rows) for name, place in (("base", MODEL), ("sft", sft))}
    for name in ("base", "sft", *told.losses.split(",")):
        if name in before:
            run, now, cell = (MODEL if name == "base" else sft), before[name], ""
        else:
            run = make(told.data, told.out, name)
            now, began = likelihoods(run, rows), before["sft" if AFTER.get(name, True) else "base"]
            right = [a[0] - b[0] > a[1] - b[1] for a, b in zip(now, began, strict=True)]
            cell = share(statistics.fmean(right), len(rows))
        likelier = share(statistics.fmean(gain > 0 for *_, gain in now), len(rows))
        nats = " | ".join(f"{statistics.fmean(pair[at] for pair in now):.1f}" for at in (0, 1))
        print(f"| {name} | {cell} | {likelier} | {nats} | {interval(write(run, rows))} |",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
