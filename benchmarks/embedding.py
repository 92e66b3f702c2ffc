"""Compare `--task embedding` with sentence-transformers, and learning rates with the default.

    python benchmarks/embedding.py equal --model all-MiniLM-L6-v2
    python benchmarks/embedding.py speed --model all-MiniLM-L6-v2 --pairs pairs.jsonl --batch 64
    python benchmarks/embedding.py encode --model all-MiniLM-L6-v2 --pairs pairs.jsonl
    python benchmarks/embedding.py rates --model all-MiniLM-L6-v2 --data data --runs runs/rates

The first three need sentence-transformers 6. `equal` compares one step of every loss in float32.
`speed` runs both in turns, in processes of their own, on the same pairs, and counts real tokens by
seconds of CPU time, which other jobs disturb less than the clock. `st-best` is
CachedMultipleNegativesRankingLoss in bfloat16. `encode` embeds the texts of the pairs as `ftlevel
predict` and `SentenceTransformer.encode` do, without loading the model. `rates` trains on the sets
wordnet-search, docstring-search and debian-search (scripts/build_data.py), and scores their test
queries. Runs that are complete are kept.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import statistics
import tempfile
import time
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from measuring import alternate, describe_machine, markdown, run_side, step_clock

ROWS, LENGTH = 12, 256
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
EPOCHS = {"wordnet-search": 3, "docstring-search": 2, "debian-search": 2}
RATES = {"lora": 1e-3, "full": 1e-4, "ia3": 3e-2, "adapter": 3e-3, "prefix": 5e-2}
"""Default learning rates, which are compared with a third and three times of each."""


def _texts(seed: int) -> list[str]:
    words = "the a of river bank money tree old light house runs over quickly green sea".split()
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(2, 30))) + f" {i}" for i in range(ROWS)]


def _rows(loss: str) -> tuple[list[dict[str, Any]], list[str], Any]:
    """Return rows for ftlevel, the columns of texts, and the labels for sentence-transformers."""
    one, two, three = map(_texts, (0, 1, 2))
    if loss in ("cosent", "angle", "cosine", "contrastive"):
        scores = [i % 5 / 4 if loss != "contrastive" else float(i % 2) for i in range(ROWS)]
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
    """Return the model with mean pooling and normalization, which a bare model gets here."""
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


def _train(model: str, method: str, data: Path, out: Path, **more: Any) -> Any:
    """Return the summary of a run on a CPU; `more` are sections, and `dtype` and `callbacks`."""
    from ftlevel import TrainConfig, train

    dtype, callbacks = more.pop("dtype", "auto"), more.pop("callbacks", ())
    config = TrainConfig(
        task="embedding",
        model={"name_or_path": model, "dtype": dtype, "device": "cpu"},
        method={"kind": method},
        data={"dataset": str(data), "max_length": LENGTH, "overlong": "truncate"},
        output={"dir": out, "overwrite": True},
        **more,
    )
    return train(config, callbacks=callbacks).summary


def _own_step(model: str, name: str, folder: Path) -> tuple[float, dict[str, Any]]:
    """Return loss and gradients of one step of ftlevel, in micro-batches of 128 tokens."""
    from transformers import TrainerCallback

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
    summary = _train(
        model,
        "full",
        data,
        folder / name.replace(" ", ""),
        dtype="float32",
        train={"max_steps": 1, "per_device_train_batch_size": ROWS, "max_grad_norm": 0},
        embedding={"loss": loss, **SETTINGS[name], **more},
        speed={"tokens_per_micro_batch": 128, "verify": False},
        callbacks=[Look()],
    )
    return summary["loss_first"], found


def equal(a: argparse.Namespace) -> None:
    """Print the relative differences of loss and gradients of each loss."""
    import torch

    print(f"{'loss':20} {'value':>10} {'difference':>10} {'gradients':>10}")
    with tempfile.TemporaryDirectory() as folder:
        model = _without_dropout(a.model, Path(folder))
        for name in SETTINGS:
            theirs, expected = _st_step(model, name)
            own, found = _own_step(model, name, Path(folder))
            apart = torch.stack([(found[n] - g).norm() for n, g in expected.items()]).norm()
            size = torch.stack([g.norm() for g in expected.values()]).norm()
            print(
                f"{name:20} {own:10.6f} {abs(own - theirs) / theirs:10.1e} {apart / size:10.1e}",
                flush=True,
            )


def _child_own(a: argparse.Namespace, folder: Path, marks: list[float]) -> None:
    _train(
        a.model,
        a.method,
        a.pairs,
        folder / "run",
        dtype=a.dtype,
        train={"max_steps": a.steps, "per_device_train_batch_size": a.batch},
        embedding={"grad_cache": a.grad_cache},
        speed={"verify": False},
        callbacks=[step_clock(marks)],
    )


def _child_st(a: argparse.Namespace, folder: Path, marks: list[float]) -> None:
    import sentence_transformers as library
    from datasets import Dataset
    from sentence_transformers.sentence_transformer import losses

    st, best = _sentence_transformer(a.model), a.child == "st-best"
    st.max_seq_length = LENGTH
    if a.method == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        targets = r".*encoder\.layer.*\.(query|key|value|dense)"
        config = LoraConfig(r=8, lora_alpha=16, target_modules=targets)
        inject_adapter_in_model(config, st[0].model)
    loss: Any = losses.MultipleNegativesRankingLoss(st)
    if best:
        loss = losses.CachedMultipleNegativesRankingLoss(st, mini_batch_size=a.mini_batch)
    rows = [json.loads(line) for line in a.pairs.open(encoding="utf-8")]
    library.SentenceTransformerTrainer(
        model=st,
        args=library.SentenceTransformerTrainingArguments(
            output_dir=str(folder),
            max_steps=a.steps,
            per_device_train_batch_size=a.batch,
            batch_sampler="no_duplicates",
            bf16=best or a.dtype == "bfloat16",
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        loss=loss,
        callbacks=[step_clock(marks)],
        train_dataset=Dataset.from_list([{k: r[k] for k in ("anchor", "positive")} for r in rows]),
    ).train()


def speed(a: argparse.Namespace) -> None:
    """Print CPU seconds per step, real tokens by CPU second and peak memory of each engine."""
    from transformers import AutoTokenizer

    rows = [json.loads(line) for line in a.pairs.open(encoding="utf-8")]
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    sizes = [
        min(len(ids), LENGTH)
        for key in ("anchor", "positive")
        for ids in tokenizer([row[key] for row in rows], verbose=False)["input_ids"]
    ]
    a_step = 2 * a.batch * statistics.fmean(sizes)
    cases = {engine: partial(run_side, "--child", engine) for engine in a.engines.split(",")}
    table = []
    for engine, results in alternate(cases, a.turns, warm_ups=0).items():
        each = "; ".join(f"{seconds:.2f}" for seconds, _ in results)
        seconds, peak = (statistics.median(column) for column in zip(*results, strict=True))
        table.append([engine, each, f"{a_step / seconds:,.0f}", f"{peak:,.0f} MiB"])
    head = ("engine", "seconds of CPU a step", "real tokens by second of CPU", "peak memory")
    print(markdown(head, table))


def encode(a: argparse.Namespace) -> None:
    """Print texts by second of CPU of both libraries in both precisions, on the same texts."""
    import torch
    from sentence_transformers import SentenceTransformer

    from ftlevel.evaluation.answers import InferenceModel
    from ftlevel.tasks.base import OutputOptions
    from ftlevel.tasks.embedding.formats import EmbeddingRow
    from ftlevel.trained.generation import GenerationOptions
    from ftlevel.trained.resolve import resolve_model

    torch.set_num_threads(1)
    rows = [json.loads(line) for line in a.pairs.open(encoding="utf-8")]
    texts = [text for row in rows for text in (row["anchor"], row["positive"])]
    table = []
    for dtype in ("float32", "bfloat16"):
        loaded = resolve_model(a.model, "embedding", device="cpu", dtype=dtype).load("cpu")
        own = InferenceModel(loaded, GenerationOptions(1), None, truncate=True)
        queries = [EmbeddingRow("", i, (text,), (0.0,)) for i, text in enumerate(texts)]
        theirs = SentenceTransformer(
            a.model, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)}
        )

        def answer(own: Any = own, queries: Any = queries, task: Any = loaded.task) -> Any:
            with own.inference():
                answers = task.predict(own, queries, OutputOptions())
            return np.stack([row.columns[""] for row in answers])

        def seconds(compute: Any) -> tuple[float, Any]:
            began = time.process_time()
            found = compute()
            return time.process_time() - began, found

        sides = {"ftlevel": answer, "sentence-transformers": partial(theirs.encode, texts)}
        cases = {name: partial(seconds, side) for name, side in sides.items()}
        results = alternate(cases, a.turns)
        (_, ours), (_, others) = (results[name][0] for name in sides)
        cosine = (ours * others).sum(1) / np.linalg.norm(others.astype(np.float32), axis=1)
        best = {name: min(spent for spent, _ in found) for name, found in results.items()}
        rates = [f"{len(texts) / best[name]:,.0f}" for name in sides]
        ratio = best["sentence-transformers"] / best["ftlevel"]
        table.append([dtype, *rates, f"{ratio:.2f}", f"{cosine.min():.5f}"])
    print(markdown(("texts by second of CPU", *sides, "ratio", "lowest cosine"), table))


def _interval(scores: Any) -> str:
    """Return `scores`, a value and its bootstrap draws, as the value with its 95 % interval."""
    value, *draws = scores
    low, high = (sorted(draws)[round(share * (len(draws) - 1))] for share in (0.025, 0.975))
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def rates(a: argparse.Namespace) -> None:
    """Print nDCG@10 of the test queries by set, method and rate, and its gain over the base."""
    from ftlevel import EvaluateConfig, evaluate

    def score(name: str, **more: Any) -> Any:
        found = evaluate(EvaluateConfig(name=name, split="test", base=False, **more))
        return np.array([found.metrics["ndcg@10"], *found.draws["ndcg@10"]])

    rows = []
    for name in a.sets.split(","):
        data, epochs = a.data / name, EPOCHS[name]
        base = score(a.model, task="embedding", dataset=str(data))
        rows.append([name, "before", _interval(base), ""])
        for method, factor in product(a.methods.split(","), (1 / 3, 1, 3)):
            rate = float(f"{RATES[method] * factor:.0e}")
            run = a.runs / f"{name}-{method}-{rate:g}"
            train = {"num_train_epochs": epochs, "per_device_train_batch_size": 64}
            if not (run / "summary.json").exists():
                _train(a.model, method, data, run, train=train | {"learning_rate": rate})
            tuned = score(str(run))
            rows.append([name, f"{method}, {rate:g}", _interval(tuned), _interval(tuned - base)])
    print(markdown(("set", "run", "ndcg@10", "difference"), rows))


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("equal", "speed", "encode", "rates"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/rates"))
    parser.add_argument("--sets", default=",".join(EPOCHS), help="of rates")
    parser.add_argument("--methods", default="lora,full", help="of rates: " + ", ".join(RATES))
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--grad-cache", default="auto")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--mini-batch", type=int, default=16, help="of st-best")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--engines", default="ftlevel,st,st-best")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        marks: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            (_child_own if a.child == "ftlevel" else _child_st)(a, Path(folder), marks)
        each = [after - before for before, after in pairwise(marks)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps([statistics.fmean(each), peak]))
        return
    print(describe_machine())
    {"equal": equal, "speed": speed, "encode": encode, "rates": rates}[a.what](a)


if __name__ == "__main__":
    main()
