"""Compare the speed of `--task embedding` with sentence-transformers 6.

    python benchmarks/embedding.py speed --model all-MiniLM-L6-v2 --pairs pairs.jsonl --batch 64
    python benchmarks/embedding.py encode --model all-MiniLM-L6-v2 --pairs pairs.jsonl

`speed` trains in separate processes on the same pairs, and counts real tokens per second of CPU
time, which other jobs affect less than wall time. `st-cached` is
CachedMultipleNegativesRankingLoss in bfloat16. `encode` embeds the texts of the pairs as `ftlevel
predict` and `SentenceTransformer.encode` do, without loading the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from measuring import (
    alternate,
    compare_sides,
    describe_machine,
    markdown,
    own_peak_mib,
    step_clock,
)

LENGTH = 256


def _pairs(args: argparse.Namespace) -> list[dict[str, str]]:
    rows = map(json.loads, args.pairs.open(encoding="utf-8"))
    return [{name: row[name] for name in ("anchor", "positive")} for row in rows]


def _figures(ends: list[float]) -> list[float]:
    """Return CPU seconds per step, and peak MiB of this process."""
    return [statistics.fmean(after - before for before, after in pairwise(ends)), own_peak_mib()]


def _ftlevel(args: argparse.Namespace) -> list[float]:
    from ftlevel import TrainConfig, train
    from ftlevel.cli.startup import prepare

    prepare()  # as the command does
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.model_validate({
            "task": "embedding", "embedding": {"grad_cache": args.grad_cache},
            "model": {"name_or_path": args.model, "dtype": args.dtype, "device": "cpu"},
            "method": {"kind": args.method}, "speed": {"verify": False},
            "data": {"dataset": str(args.pairs), "max_length": LENGTH, "overlong": "truncate"},
            "train": {"max_steps": args.steps, "per_device_train_batch_size": args.batch},
            "output": {"dir": f"{folder}/run"},
        })  # fmt: skip
        train(config, callbacks=[step_clock(ends)])
    return _figures(ends)


def _sentence_transformers(args: argparse.Namespace) -> list[float]:
    import sentence_transformers as library
    from datasets import Dataset
    from sentence_transformers.sentence_transformer import losses, modules

    # Mean pooling and normalization, as ftlevel uses for a bare model.
    transformer = modules.Transformer(args.model)
    pooling = modules.Pooling(transformer.get_embedding_dimension(), "mean")
    parts = [transformer, pooling, modules.Normalize()]
    model, ends = library.SentenceTransformer(modules=parts, device="cpu"), list[float]()
    model.max_seq_length = LENGTH
    if args.method == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        targets = r".*encoder\.layer.*\.(query|key|value|dense)"
        config = LoraConfig(r=8, lora_alpha=16, target_modules=targets)
        inject_adapter_in_model(config, transformer.model)
    loss: Any = losses.MultipleNegativesRankingLoss(model)
    if args.side == "st-cached":
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=args.mini_batch)
    with tempfile.TemporaryDirectory() as folder:
        library.SentenceTransformerTrainer(
            model=model,
            args=library.SentenceTransformerTrainingArguments(
                output_dir=folder, max_steps=args.steps, per_device_train_batch_size=args.batch,
                batch_sampler="no_duplicates", use_cpu=True, save_strategy="no", report_to=[],
                bf16=args.side == "st-cached" or args.dtype == "bfloat16", disable_tqdm=True,
            ),
            loss=loss,
            callbacks=[step_clock(ends)],
            train_dataset=Dataset.from_list(_pairs(args)),
        ).train()  # fmt: skip
    return _figures(ends)


def speed(parser: argparse.ArgumentParser) -> None:
    """Print CPU seconds per step, real tokens per CPU second and peak memory of each side."""
    from transformers import AutoTokenizer

    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--grad-cache", default="auto")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--mini-batch", type=int, default=16, help="of st-cached")
    parser.add_argument("--steps", type=int, default=4)
    measures = {"ftlevel": _ftlevel, "st": _sentence_transformers}
    args, results = compare_sides(parser, {**measures, "st-cached": _sentence_transformers})
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [text for pair in _pairs(args) for text in pair.values()]
    sizes = [min(len(ids), LENGTH) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    tokens_per_step = 2 * args.batch * statistics.fmean(sizes)
    table = []
    for side, runs in results.items():
        seconds, peak = map(statistics.median, zip(*runs, strict=True))
        figures = (f"{seconds:.2f}", f"{tokens_per_step / seconds:,.0f}", f"{peak:,.0f} MiB")
        table.append([side, *figures])
    head = ("side", "CPU seconds per step", "real tokens per CPU second", "peak memory")
    print(f"{describe_machine()}\n\n{markdown(head, table)}")


def encode(parser: argparse.ArgumentParser) -> None:
    """Print texts per CPU second of both libraries in both precisions, on the same texts."""
    import torch
    from sentence_transformers import SentenceTransformer

    from ftlevel.evaluation.answers import InferenceModel
    from ftlevel.extras.retrieval.formats import EmbeddingRow
    from ftlevel.tasks.base import OutputOptions
    from ftlevel.trained.generation import GenerationOptions
    from ftlevel.trained.resolve import resolve_model

    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    texts = [text for pair in _pairs(args) for text in pair.values()]
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
        results = alternate(cases, args.rounds)
        (_, actual), (_, expected) = (results[name][0] for name in sides)
        cosine = (actual * expected).sum(1) / np.linalg.norm(expected.astype(np.float32), axis=1)
        best = {name: min(spent for spent, _ in found) for name, found in results.items()}
        rates = [f"{len(texts) / best[name]:,.0f}" for name in sides]
        ratio = best["sentence-transformers"] / best["ftlevel"]
        table.append([dtype, *rates, f"{ratio:.2f}", f"{cosine.min():.5f}"])
    head = ("texts per CPU second", *sides, "ratio", "lowest cosine")
    print(f"{describe_machine()}\n\n{markdown(head, table)}")


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("speed", "encode"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    {"speed": speed, "encode": encode}[parser.parse_known_args()[0].what](parser)


if __name__ == "__main__":
    main()
