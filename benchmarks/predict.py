#!/usr/bin/env python3
"""Compare predictions per second with transformers: its pipeline, and generate.

    python benchmarks/predict.py                          both, 2,000 and 64 rows, 3 rounds
    python benchmarks/predict.py classes --rows 400
    python benchmarks/predict.py texts --rows 16 --batch-size 8
    python benchmarks/predict.py memory --rows 100000     peak memory against the rows

Both sides answer the same rows with the same loaded model, in float32, in turns, each once before
the first round; what is printed are seconds of the processor (of the clock in brackets) and their
ratio, round by round. Answers must be equal: labels, probabilities to 1e-5, texts to the letter.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measuring import describe_machine
from training.workloads import MINILM, SMOLLM2

from ftlevel import TrainConfig, train
from ftlevel.data.encoding.encode import encode_prompt
from ftlevel.data.formats.examples import LabeledText
from ftlevel.data.sources.docstrings import read_docstrings
from ftlevel.evaluation import decoding
from ftlevel.evaluation.answers import InferenceModel, predict_rows
from ftlevel.evaluation.decoding import open_decoder
from ftlevel.tasks.base import OutputOptions
from ftlevel.trained.generation import GenerationOptions, generate_texts
from ftlevel.trained.model_ref import LoadedModel
from ftlevel.trained.resolve import resolve_model

BATCH = 32  # of the pipeline
Side = Callable[[], Sequence[Any]]


def mixed_texts(count: int) -> list[str]:
    """Return texts of 4 to some 200 words, most of them short."""
    draw = random.Random(0)
    whole = [row["document"] for row in read_docstrings("summarization", "train", 600)]
    words = [draw.choice(whole).split() for _ in range(count)]
    return [" ".join(w[: max(4, int(200 * draw.random() ** 3))]) for w in words]


def train_classifier(folder: Path, model: str | None) -> Path:
    """Train a LoRA classifier for some steps, so that its answers differ; return the run."""
    rows = [
        {"text": text, "label": "long" if len(text) > 150 else "short"} for text in mixed_texts(256)
    ]
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    train(
        TrainConfig.model_validate({
            "task": "text-classification",
            "model": {"name_or_path": model or str(MINILM), "dtype": "float32"},
            "data": {"dataset": str(folder / "rows.csv"), "overlong": "truncate-prompt",
                     "gate": {"near_duplicates": "ignore", "exact_duplicates": "ignore"}},
            "train": {"max_steps": 10},
            "output": {"dir": str(folder / "run")},
        })
    )  # fmt: skip
    return folder / "run"


def class_sides(trained: LoadedModel, texts: Sequence[str]) -> tuple[Side, Side]:
    """Return both sides of classification: label and probability of each text."""
    import transformers

    transformers.logging.set_verbosity_error()  # it does not know a PeftModel by name
    pipe = transformers.pipeline(
        "text-classification", model=trained.model, tokenizer=trained.tokenizer
    )

    def ours() -> Sequence[Any]:
        model = InferenceModel(trained, GenerationOptions(1), None)
        rows = [LabeledText(text, None, 0, i) for i, text in enumerate(texts)]
        with model.inference():
            replies = predict_rows(model, rows, OutputOptions()).replies
        return [(r.text, r.scores[r.text]) for r in replies if r is not None]

    def theirs() -> Sequence[Any]:
        found = pipe(list(texts), batch_size=BATCH, truncation=True)
        return [(row["label"], row["score"]) for row in found]

    return ours, theirs


def text_sides(
    trained: LoadedModel, prompts: Sequence[list[int]], size: int, new: int
) -> tuple[Side, Side]:
    """Return both sides of writing: rows that come and go, and batches sorted by length."""
    import torch

    model, tokenizer = trained.model, trained.tokenizer
    with torch.no_grad():
        decoder = open_decoder(trained, prompts)
    if not decoder:
        raise SystemExit("the model is left to generate: there is nothing to compare")

    def ours() -> Sequence[Any]:
        model.set_attn_implementation(decoding.NAME)
        with torch.no_grad():
            texts = decoder(prompts, new, size)
        said = tokenizer.batch_decode(texts, skip_special_tokens=True)
        return [text.strip() for text in said]

    def theirs() -> Sequence[Any]:
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            return generate_texts(model, tokenizer, prompts, "cpu", size, GenerationOptions(new))

    return ours, theirs


def compare(name: str, sides: tuple[Side, Side], rounds: int, count: int) -> float:
    """Measure in turns, print a line a round, and return the median ratio of processor time."""
    ours, theirs = (side() for side in sides)
    equal = sum(_equal(one, other) for one, other in zip(ours, theirs, strict=True))
    print(f"{name}: {equal:,} of {count:,} answers are equal", flush=True)
    ratios = []
    for number in range(1, rounds + 1):
        (own, own_wall), (other, other_wall) = (_measure(side) for side in sides)
        ratios.append(other / own)
        print(f"  round {number}: ftlevel {own:.1f} s ({own_wall:.1f}), transformers {other:.1f} s "
              f"({other_wall:.1f}), ratio {other / own:.2f}", flush=True)  # fmt: skip
    print(f"  median ratio {statistics.median(ratios):.2f}; {count / own:,.1f} rows/s")
    return statistics.median(ratios)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, str):
        return bool(one == other)
    return bool(one[0] == other[0] and abs(one[1] - other[1]) < 1e-5)


def _measure(side: Side) -> tuple[float, float]:
    began, clock = time.process_time(), time.perf_counter()
    side()
    return time.process_time() - began, time.perf_counter() - clock


def measure_memory(run: Path, folder: Path, rows: int) -> None:
    """Predict a tenth of `rows`, then all of them, each in a process of its own; print its peak."""
    for count in (rows // 10, rows):
        path = folder / f"rows-{count}.csv"
        with path.open("w", encoding="utf-8") as file:
            file.write("id,text\n")
            file.writelines(f"{i},row {i} of a file that is longer\n" for i in range(count))
        output = folder / f"told-{count}.csv"
        command = [sys.executable, "-m", "ftlevel", "predict", str(run), "--dataset", str(path),
                   "--output", str(output), "--quiet"]  # fmt: skip
        began = time.perf_counter()
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"predict ended with {status}")
        took = time.perf_counter() - began
        print(f"{count:,} rows: peak {usage.ru_maxrss / 1024:,.0f} MiB, {took:.0f} s in all",
              flush=True)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what was named, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", nargs="*", help="classes, texts, memory; the first two by default")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--new", type=int, default=48, help="longest text in tokens")
    parser.add_argument("--model", help="instead of MiniLM or SmolLM2")
    arguments = parser.parse_args(argv)
    what = arguments.what or ["classes", "texts"]
    print(describe_machine())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if {"classes", "memory"} & set(what):
            run = train_classifier(folder, arguments.model)
        if "classes" in what:
            texts = mixed_texts(arguments.rows or 2_000)
            trained = resolve_model(str(run), device="cpu").load("cpu")
            compare("classes", class_sides(trained, texts), arguments.rounds, len(texts))
        if "memory" in what:
            measure_memory(run, folder, arguments.rows or 100_000)
        if "texts" in what:
            name = arguments.model or str(SMOLLM2)
            trained = resolve_model(name, "summarization", device="cpu").load("cpu")
            trained.model.float()
            rows = read_docstrings("summarization", "test", arguments.rows or 64)
            form = trained.ref.prompt_format
            if form is None:
                raise TypeError("a model that writes text has a prompt format")
            prompts = [
                encode_prompt(trained.tokenizer, form, row["document"][:900]) for row in rows
            ]
            sides = text_sides(trained, prompts, arguments.batch_size, arguments.new)
            compare("texts", sides, arguments.rounds, len(prompts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
