"""Compare `--task embedding` with sentence-transformers, and learning rates with the default.

    python benchmarks/embedding.py equal --model all-MiniLM-L6-v2
    python benchmarks/embedding.py speed --model all-MiniLM-L6-v2 --pairs pairs.jsonl --batch 64
    python benchmarks/embedding.py encode --model all-MiniLM-L6-v2 --pairs pairs.jsonl
    python benchmarks/embedding.py rates --model all-MiniLM-L6-v2 --data data --runs runs/rates

The first three need sentence-transformers 6. `equal` compares one step of every loss in float32.
`speed` alternates both in separate processes on the same pairs, and counts real tokens per second
of CPU time, which other jobs affect less than wall time. `st-best` is
CachedMultipleNegativesRankingLoss in bfloat16. `encode` embeds the texts of the pairs as `ftlevel
predict` and `SentenceTransformer.encode` do, without loading the model. `rates` trains on the sets
wordnet-search, docstring-search and debian-search (scripts/build_data.py), and scores their test
queries. Complete runs are kept.
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
"""Default learning rates; each is compared with a third and three times of it."""


def _texts(seed: int) -> list[str]:
    words = "the a of river bank money tree old light house runs over quickly green sea".split()
    generator = random.Random(seed)
    return [
        " ".join(generator.choices(words, k=generator.randint(2, 30))) + f" {i}"
        for i in range(ROWS)
    ]


def _rows(loss: str) -> tuple[list[dict[str, Any]], list[str], Any]:
    """Return rows for ftlevel, the columns of texts, and the labels for sentence-transformers."""
    first, second, third = map(_texts, (0, 1, 2))
    if loss in ("cosent", "angle", "cosine", "contrastive"):
        scores = [i % 5 / 4 if loss != "contrastive" else float(i % 2) for i in range(ROWS)]
        rows = [
            {"sentence1": a, "sentence2": b, "score": s}
            for a, b, s in zip(first, second, scores, strict=True)
        ]
        return rows, ["sentence1", "sentence2"], scores
    rows = [
        {"anchor": a, "positive": b, "negative": c}
        for a, b, c in zip(first, second, third, strict=True)
    ]
    teacher = [[3.0 + i / 7, 1.0 - i / 9] for i in range(ROWS)]
    if loss in ("margin-mse", "kl"):
        rows = [
            {**row, "label": scores_of_row}
            for row, scores_of_row in zip(rows, teacher, strict=True)
        ]
    return rows, ["anchor", "positive", "negative"], teacher


def _without_dropout(model: str, folder: Path) -> str:
    """Return the path of a copy of the model without dropout."""
    copy = shutil.copytree(model, folder / "model")
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config |= {name: 0.0 for name in config if "dropout" in name}
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(copy)


def _sentence_transformer(model: str) -> Any:
    """Return the model with mean pooling and normalization, as ftlevel uses for a bare model."""
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
    symmetric = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    loss_module = {
        "mnrl": lambda: losses.MultipleNegativesRankingLoss(
            st, **(symmetric if SETTINGS[name].get("symmetric") else {})
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
        loss_module = losses.MatryoshkaLoss(st, loss_module, matryoshka_dims=list(dims))
    features = [st.preprocess([row[column] for row in rows]) for column in columns]
    value = loss_module(features, torch.tensor(labels))
    value.backward()
    return float(value.detach()), {
        parameter: p.grad for parameter, p in st[0].model.named_parameters() if p.grad is not None
    }


def _train(model: str, method: str, data: Path, out: Path, **sections: Any) -> Any:
    """Return the summary of a run on CPU; `sections` are sections, `dtype` and `callbacks`."""
    from ftlevel import TrainConfig, train

    dtype, callbacks = sections.pop("dtype", "auto"), sections.pop("callbacks", ())
    config = TrainConfig(
        task="embedding",
        model={"name_or_path": model, "dtype": dtype, "device": "cpu"},
        method={"kind": method},
        data={"dataset": str(data), "max_length": LENGTH, "overlong": "truncate"},
        output={"dir": out, "overwrite": True},
        **sections,
    )
    return train(config, callbacks=callbacks).summary


def _ftlevel_step(model: str, name: str, folder: Path) -> tuple[float, dict[str, Any]]:
    """Return loss and gradients of one step of ftlevel, in micro-batches of 128 tokens."""
    from transformers import TrainerCallback

    loss = name.partition(",")[0]
    data = folder / f"{loss}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in _rows(loss)[0]), encoding="utf-8")
    gradients: dict[str, Any] = {}

    class RecordGradients(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            gradients.update(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
            )

    guide = {"guide": model} if loss == "gist" else {}
    summary = _train(
        model,
        "full",
        data,
        folder / name.replace(" ", ""),
        dtype="float32",
        train={"max_steps": 1, "per_device_train_batch_size": ROWS, "max_grad_norm": 0},
        embedding={"loss": loss, **SETTINGS[name], **guide},
        speed={"tokens_per_micro_batch": 128, "verify": False},
        callbacks=[RecordGradients()],
    )
    return summary["loss_first"], gradients


def equal(args: argparse.Namespace) -> None:
    """Print the relative differences of loss and gradients of each loss."""
    import torch

    print(f"{'loss':20} {'value':>10} {'difference':>10} {'gradients':>10}")
    with tempfile.TemporaryDirectory() as folder:
        model = _without_dropout(args.model, Path(folder))
        for name in SETTINGS:
            expected_loss, expected = _st_step(model, name)
            actual_loss, actual = _ftlevel_step(model, name, Path(folder))
            difference = torch.stack([(actual[n] - g).norm() for n, g in expected.items()]).norm()
            size = torch.stack([g.norm() for g in expected.values()]).norm()
            change = abs(actual_loss - expected_loss) / expected_loss
            line = f"{name:20} {actual_loss:10.6f} {change:10.1e} {difference / size:10.1e}"
            print(line, flush=True)


def _child_ftlevel(args: argparse.Namespace, folder: Path, marks: list[float]) -> None:
    _train(
        args.model,
        args.method,
        args.pairs,
        folder / "run",
        dtype=args.dtype,
        train={"max_steps": args.steps, "per_device_train_batch_size": args.batch},
        embedding={"grad_cache": args.grad_cache},
        speed={"verify": False},
        callbacks=[step_clock(marks)],
    )


def _child_st(args: argparse.Namespace, folder: Path, marks: list[float]) -> None:
    import sentence_transformers as library
    from datasets import Dataset
    from sentence_transformers.sentence_transformer import losses

    st, best = _sentence_transformer(args.model), args.child == "st-best"
    st.max_seq_length = LENGTH
    if args.method == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        targets = r".*encoder\.layer.*\.(query|key|value|dense)"
        config = LoraConfig(r=8, lora_alpha=16, target_modules=targets)
        inject_adapter_in_model(config, st[0].model)
    loss: Any = losses.MultipleNegativesRankingLoss(st)
    if best:
        loss = losses.CachedMultipleNegativesRankingLoss(st, mini_batch_size=args.mini_batch)
    rows = [json.loads(line) for line in args.pairs.open(encoding="utf-8")]
    library.SentenceTransformerTrainer(
        model=st,
        args=library.SentenceTransformerTrainingArguments(
            output_dir=str(folder),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            batch_sampler="no_duplicates",
            bf16=best or args.dtype == "bfloat16",
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        loss=loss,
        callbacks=[step_clock(marks)],
        train_dataset=Dataset.from_list([{k: r[k] for k in ("anchor", "positive")} for r in rows]),
    ).train()


def speed(args: argparse.Namespace) -> None:
    """Print CPU seconds per step, real tokens per CPU second and peak memory of each engine."""
    from transformers import AutoTokenizer

    rows = [json.loads(line) for line in args.pairs.open(encoding="utf-8")]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sizes = [
        min(len(ids), LENGTH)
        for key in ("anchor", "positive")
        for ids in tokenizer([row[key] for row in rows], verbose=False)["input_ids"]
    ]
    tokens_per_step = 2 * args.batch * statistics.fmean(sizes)
    cases = {engine: partial(run_side, "--child", engine) for engine in args.engines.split(",")}
    table = []
    for engine, results in alternate(cases, args.turns, warm_ups=0).items():
        seconds_of_runs = "; ".join(f"{seconds:.2f}" for seconds, _ in results)
        seconds, peak = (statistics.median(column) for column in zip(*results, strict=True))
        table.append(
            [engine, seconds_of_runs, f"{tokens_per_step / seconds:,.0f}", f"{peak:,.0f} MiB"]
        )
    head = ("engine", "CPU seconds per step", "real tokens per CPU second", "peak memory")
    print(markdown(head, table))


def encode(args: argparse.Namespace) -> None:
    """Print texts per CPU second of both libraries in both precisions, on the same texts."""
    import torch
    from sentence_transformers import SentenceTransformer

    from ftlevel.evaluation.answers import InferenceModel
    from ftlevel.tasks.base import OutputOptions
    from ftlevel.tasks.embedding.formats import EmbeddingRow
    from ftlevel.trained.generation import GenerationOptions
    from ftlevel.trained.resolve import resolve_model

    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.pairs.open(encoding="utf-8")]
    texts = [text for row in rows for text in (row["anchor"], row["positive"])]
    table = []
    for dtype in ("float32", "bfloat16"):
        loaded = resolve_model(args.model, "embedding", device="cpu", dtype=dtype).load("cpu")
        inference_model = InferenceModel(loaded, GenerationOptions(1), None, truncate=True)
        queries = [EmbeddingRow("", i, (text,), (0.0,)) for i, text in enumerate(texts)]
        reference = SentenceTransformer(
            args.model, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)}
        )

        def predict(
            inference_model: Any = inference_model, queries: Any = queries, task: Any = loaded.task
        ) -> Any:
            with inference_model.inference():
                answers = task.predict(inference_model, queries, OutputOptions())
            return np.stack([row.columns[""] for row in answers])

        def time_call(compute: Any) -> tuple[float, Any]:
            start = time.process_time()
            result = compute()
            return time.process_time() - start, result

        sides = {"ftlevel": predict, "sentence-transformers": partial(reference.encode, texts)}
        cases = {name: partial(time_call, side) for name, side in sides.items()}
        results = alternate(cases, args.turns)
        (_, actual), (_, expected) = (results[name][0] for name in sides)
        cosine = (actual * expected).sum(1) / np.linalg.norm(expected.astype(np.float32), axis=1)
        best = {name: min(spent for spent, _ in found) for name, found in results.items()}
        rates = [f"{len(texts) / best[name]:,.0f}" for name in sides]
        ratio = best["sentence-transformers"] / best["ftlevel"]
        table.append([dtype, *rates, f"{ratio:.2f}", f"{cosine.min():.5f}"])
    print(markdown(("texts per CPU second", *sides, "ratio", "lowest cosine"), table))


def _interval(scores: Any) -> str:
    """Return `scores`, a value and its bootstrap draws, as the value with its 95 % interval."""
    value, *draws = scores
    low, high = (sorted(draws)[round(share * (len(draws) - 1))] for share in (0.025, 0.975))
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def rates(args: argparse.Namespace) -> None:
    """Print nDCG@10 of the test queries by set, method and rate, and its gain over the base."""
    from ftlevel import EvaluateConfig, evaluate

    def score(name: str, **options: Any) -> Any:
        evaluation = evaluate(EvaluateConfig(name=name, split="test", base=False, **options))
        return np.array([evaluation.metrics["ndcg@10"], *evaluation.draws["ndcg@10"]])

    rows = []
    for name in args.sets.split(","):
        data, epochs = args.data / name, EPOCHS[name]
        base = score(args.model, task="embedding", dataset=str(data))
        rows.append([name, "before", _interval(base), ""])
        for method, factor in product(args.methods.split(","), (1 / 3, 1, 3)):
            rate = float(f"{RATES[method] * factor:.0e}")
            run = args.runs / f"{name}-{method}-{rate:g}"
            train = {"num_train_epochs": epochs, "per_device_train_batch_size": 64}
            if not (run / "summary.json").exists():
                _train(args.model, method, data, run, train=train | {"learning_rate": rate})
            tuned = score(str(run))
            rows.append([name, f"{method}, {rate:g}", _interval(tuned), _interval(tuned - base)])
    print(markdown(("set", "run", "ndcg@10", "difference"), rows))


def main() -> None:
    """Run the benchmark of the command line."""
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
    args = parser.parse_args()
    if args.child:
        marks: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            (_child_ftlevel if args.child == "ftlevel" else _child_st)(args, Path(folder), marks)
        durations = [after - before for before, after in pairwise(marks)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps([statistics.fmean(durations), peak]))
        return
    print(describe_machine())
    {"equal": equal, "speed": speed, "encode": encode, "rates": rates}[args.what](args)


if __name__ == "__main__":
    main()
