"""Compare `--task embedding` with sentence-transformers: loss, gradients and speed.

    python benchmarks/embedding.py equal --model all-MiniLM-L6-v2
    python benchmarks/embedding.py speed --model all-MiniLM-L6-v2 --pairs pairs.jsonl --batch 64

Needs sentence-transformers 6. `equal` compares one step of every loss in float32. `speed` runs both
in turns, in processes of their own, on the same pairs, and counts real tokens by seconds of CPU
time, which other jobs disturb less than the clock. `st-best` is CachedMultipleNegativesRankingLoss
with mini-batches of 16 in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROWS = 12
SCORES = [0.0, 0.25, 0.5, 0.75, 1.0]
SETTINGS: dict[str, dict[str, Any]] = {
    "mnrl": {},
    "mnrl, symmetric": {"symmetric": True},
    "mnrl, matryoshka": {"matryoshka_dims": (384, 128, 32)},
    "gist": {},
    "cosent": {},
    "angle": {},
    "cosine": {},
    "contrastive": {},
    "triplet": {},
    "margin-mse": {},
    "kl": {"temperature": 0.5},
}


def _texts(seed: int) -> list[str]:
    words = "the a of river bank money tree old light house runs over quickly green sea".split()
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(2, 30))) + f" {i}" for i in range(ROWS)]


def _rows(loss: str) -> tuple[list[dict[str, Any]], list[str], Any]:
    """Return rows for ftlevel, the columns of texts, and the labels for sentence-transformers."""
    one, two, three = map(_texts, (0, 1, 2))
    if loss in ("cosent", "angle", "cosine", "contrastive"):
        scores = [SCORES[i % 5] if loss != "contrastive" else float(i % 2) for i in range(ROWS)]
        rows = [
            {"sentence1": a, "sentence2": b, "score": s}
            for a, b, s in zip(one, two, scores, strict=True)
        ]
        return rows, ["sentence1", "sentence2"], scores
    rows = [
        {"anchor": a, "positive": b, "negative": c} for a, b, c in zip(one, two, three, strict=True)
    ]
    teacher = [[3.0 + i / 7, 1.0 - i / 9] for i in range(ROWS)]
    if loss in ("margin-mse", "kl"):
        rows = [{**row, "label": told} for row, told in zip(rows, teacher, strict=True)]
    return rows, ["anchor", "positive", "negative"], teacher


def _without_dropout(model: str, folder: Path) -> str:
    """Return a copy of the model in `folder` that draws nothing at random."""
    copy = shutil.copytree(model, folder / "model")
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config |= {name: 0.0 for name in config if "dropout" in name}
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(copy)


def _sentence_transformer(model: str) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    transformer = modules.Transformer(model)
    pooling = modules.Pooling(transformer.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[transformer, pooling, modules.Normalize()], device="cpu")


def _st_step(model: str, name: str) -> tuple[float, dict[str, Any]]:
    """Return loss and gradients of one step of sentence-transformers."""
    import torch
    from sentence_transformers.sentence_transformer import losses

    st, loss = _sentence_transformer(model), name.partition(",")[0]
    rows, columns, labels = _rows(loss)
    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    made = {
        "mnrl": lambda: losses.MultipleNegativesRankingLoss(
            st, **(both if SETTINGS[name].get("symmetric") else {})
        ),
        "gist": lambda: losses.GISTEmbedLoss(st, _sentence_transformer(model)),
        "cosent": lambda: losses.CoSENTLoss(st),
        "angle": lambda: losses.AnglELoss(st),
        "cosine": lambda: losses.CosineSimilarityLoss(st),
        "contrastive": lambda: losses.ContrastiveLoss(st),
        "triplet": lambda: losses.TripletLoss(st),
        "margin-mse": lambda: losses.MarginMSELoss(st),
        "kl": lambda: losses.DistillKLDivLoss(st, temperature=0.5),
    }[loss]()
    if dims := SETTINGS[name].get("matryoshka_dims"):
        made = losses.MatryoshkaLoss(st, made, matryoshka_dims=list(dims))
    features = [st.preprocess([row[column] for row in rows]) for column in columns]
    value = made(features, torch.tensor(labels))
    value.backward()
    return float(value.detach()), {
        parameter: p.grad for parameter, p in st[0].model.named_parameters() if p.grad is not None
    }


def _own_step(model: str, name: str, folder: Path) -> tuple[float, dict[str, Any]]:
    """Return loss and gradients of one step of ftlevel, in micro-batches of 128 tokens."""
    from transformers import TrainerCallback

    from ftlevel.commands.train import train
    from ftlevel.config import TrainConfig

    loss = name.partition(",")[0]
    data = folder / f"{loss}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in _rows(loss)[0]), encoding="utf-8")
    found: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            found.update(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
            )

    more = {"guide": model} if loss == "gist" else {}
    summary = train(
        TrainConfig(
            task="embedding",
            model={"name_or_path": model, "dtype": "float32", "device": "cpu"},
            method={"kind": "full"},
            data={"dataset": str(data)},
            train={"max_steps": 1, "per_device_train_batch_size": ROWS, "max_grad_norm": 0},
            embedding={"loss": loss, **SETTINGS[name], **more},
            speed={"tokens_per_micro_batch": 128, "verify": False},
            output={"dir": folder / name.replace(" ", "")},
        ),
        callbacks=[Look()],
    ).summary
    return summary["loss_first"], found


def equal(model: str, names: list[str]) -> None:
    """Print the relative differences of loss and gradients for the losses `names`."""
    import torch

    print(f"{'loss':20} {'value':>10} {'difference':>10} {'gradients':>10}")
    with tempfile.TemporaryDirectory() as folder:
        model = _without_dropout(model, Path(folder))
        for name in names:
            theirs, expected = _st_step(model, name)
            own, found = _own_step(model, name, Path(folder))
            apart = torch.stack([(found[n] - g).norm() for n, g in expected.items()]).norm()
            size = torch.stack([g.norm() for g in expected.values()]).norm()
            print(
                f"{name:20} {own:10.6f} {abs(own - theirs) / theirs:10.1e} {apart / size:10.1e}",
                flush=True,
            )


class _Clock:
    """CPU seconds at the ends of steps."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def callback(self) -> Any:
        from transformers import TrainerCallback

        marks = self.marks

        class Mark(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                marks.append(time.process_time())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                marks.append(time.process_time())

        return Mark()


def _child_own(a: argparse.Namespace, folder: Path) -> list[float]:
    from ftlevel.commands.train import train
    from ftlevel.config import TrainConfig

    clock = _Clock()
    config = TrainConfig(
        task="embedding",
        model={"name_or_path": a.model, "dtype": a.dtype, "device": "cpu"},
        method={"kind": a.method},
        data={"dataset": str(a.pairs), "max_length": a.length, "overlong": "truncate"},
        train={"max_steps": a.steps, "per_device_train_batch_size": a.batch},
        embedding={"grad_cache": a.grad_cache},
        speed={"verify": False},
        output={"dir": folder / "run"},
    )
    train(config, callbacks=[clock.callback()])
    return clock.marks


def _child_st(a: argparse.Namespace, folder: Path) -> list[float]:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses

    st, best = _sentence_transformer(a.model), a.child == "st-best"
    st.max_seq_length = a.length
    if a.method == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        targets = r".*encoder\.layer.*\.(query|key|value|dense)"
        config = LoraConfig(
            task_type="FEATURE_EXTRACTION", r=8, lora_alpha=16, target_modules=targets
        )
        inject_adapter_in_model(config, st[0].model)
    loss: Any = losses.MultipleNegativesRankingLoss(st)
    if best:
        loss = losses.CachedMultipleNegativesRankingLoss(st, mini_batch_size=16)
    rows = [json.loads(line) for line in a.pairs.open(encoding="utf-8")]
    clock = _Clock()
    SentenceTransformerTrainer(
        model=st,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(folder),
            max_steps=a.steps,
            per_device_train_batch_size=a.batch,
            batch_sampler="no_duplicates",
            bf16=best or a.dtype == "bfloat16",
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=42,
        ),
        loss=loss,
        callbacks=[clock.callback()],
        train_dataset=Dataset.from_list([{k: r[k] for k in ("anchor", "positive")} for r in rows]),
    ).train()
    return clock.marks


def speed(a: argparse.Namespace) -> None:
    """Print real tokens by CPU second and peak memory of both, run in turns."""
    from transformers import AutoTokenizer

    rows = [json.loads(line) for line in a.pairs.open(encoding="utf-8")]
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    sizes = [
        min(len(ids), a.length)
        for key in ("anchor", "positive")
        for ids in tokenizer([row[key] for row in rows], verbose=False)["input_ids"]
    ]
    a_step = 2 * a.batch * statistics.fmean(sizes)
    found: dict[str, list[tuple[float, int]]] = {}
    for turn in range(a.turns):
        for child in a.engines.split(",") if turn % 2 == 0 else reversed(a.engines.split(",")):
            command = [sys.executable, *sys.argv, "--child", child]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            seconds, peak = json.loads(said.strip().splitlines()[-1])
            found.setdefault(child, []).append((seconds, peak))
            print(f"{child}: {seconds:.2f} s of CPU a step, peak {peak:,} MiB", flush=True)
    for child, results in found.items():
        seconds = statistics.median(s for s, _ in results)
        peak = statistics.median(p for _, p in results)
        print(f"{child:8} {a_step / seconds:8.0f} real tokens by CPU second, {peak:,.0f} MiB")


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("equal", "speed"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--losses", help="of `equal`, with semicolons between; default: all")
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--grad-cache", default="auto")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--engines", default="ftlevel,st,st-best")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        with tempfile.TemporaryDirectory() as folder:
            marks = (_child_own if a.child == "ftlevel" else _child_st)(a, Path(folder))
        each = [after - before for before, after in pairwise(marks[1:])]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps([statistics.fmean(each), peak]))
    elif a.what == "equal":
        equal(a.model, a.losses.split(";") if a.losses else list(SETTINGS))
    else:
        speed(a)


if __name__ == "__main__":
    main()
