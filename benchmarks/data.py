#!/usr/bin/env python3
"""Measure speed and memory of data preparation, and the cost of the data checks.

    python benchmarks/data.py
    python benchmarks/data.py --rows 10000 100000 1000000 --trl-python ~/venvs/trl/bin/python

The rows are those of data/docstring-summary (document → summary), repeated as often as it takes.
In each copy the words of the document stand in another order, so that lengths and words are real
and no row is a duplicate. Each figure is one run of a process of its own, with the tokenizer and
the chat template of SmolLM2-135M-Instruct. Memory is the peak of the resident set, the largest
child's added once for each process, less what the process held before it read a row. What the gate
takes of encoding is a ratio of CPU seconds, where one process does both; the digests of texts that
it reads are the gate's, though they are made where the rows are encoded. TRL's
preparation of the same rows is what the constructor of `SFTTrainer` takes, less what it takes for
one row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"
SOURCE = ROOT / "data" / "docstring-summary" / "train.jsonl"


def write_rows(path: Path, count: int) -> None:
    """Write `count` distinct rows."""
    rows = [json.loads(line) for line in SOURCE.read_text(encoding="utf-8").splitlines()]
    shuffle = random.Random(0).shuffle
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            row = rows[i % len(rows)]
            words = row["document"].split()
            if i >= len(rows):
                shuffle(words)
            document = f"{i}: {' '.join(words)}"
            file.write(json.dumps({"document": document, "summary": row["summary"]}) + "\n")


def write_short_rows(path: Path, count: int) -> None:
    """Write `count` distinct short texts, of words of the real rows."""
    words = SOURCE.read_text(encoding="utf-8").replace("\\n", " ").split()[:50_000]
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            at = i * 7 % (len(words) - 8)
            text = f"{i}: {' '.join(words[at : at + 8])}"
            file.write(json.dumps({"text": text}) + "\n")


class AnonymousPeak:
    """Samples the anonymous memory of this process and its children, shared pages counted once.

    Unlike the resident set it leaves out pages of mapped files, which the system can take back.

    Attributes:
        mib: the most so far, in MiB.
    """

    def __init__(self, seconds: float = 0.1) -> None:
        self.mib = 0.0
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> AnonymousPeak:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(self._seconds):
            self._look()

    def _look(self) -> None:
        self.mib = max(self.mib, anonymous_mib())


def anonymous_mib() -> float:
    """Return the anonymous memory of this process and its children in MiB (Linux)."""
    children = Path("/proc/self/task").glob("*/children")
    total = 0
    for number in ["self", *(n for file in children for n in file.read_text().split())]:
        with contextlib.suppress(OSError):
            rollup = Path(f"/proc/{number}/smaps_rollup").read_text(encoding="utf-8")
            found = re.search(r"Pss_Anon:\s+(\d+) kB", rollup)
            total += int(found[1]) if found else 0
    return total / 1024


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def peak_mib(processes: int) -> float:
    """Return the peak resident set of this process and its children in MiB."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss if processes > 1 else 0
    return (own + child * processes * (processes > 1)) / 1024


def measure_ours(
    data: Path, processes: int, *, cache: bool, task: str = "summarization"
) -> dict[str, Any]:
    """Prepare `data` as `ftlevel train --task` does; return figures."""
    from ftlevel.config import DataConfig
    from ftlevel.data.encoding.fit import LengthBounds
    from ftlevel.data.gate import gate
    from ftlevel.data.prepare import encoder
    from ftlevel.data.prepare import encoder as encoding
    from ftlevel.data.prepare.dataset import prepare_data
    from ftlevel.data.prepare.encoder import EncodingContext
    from ftlevel.models.loading import load_config, load_tokenizer
    from ftlevel.models.sources import resolve_source
    from ftlevel.tasks import TASKS

    seconds = {"encode": 0.0, "check": 0.0, "digests": 0.0}

    def timed(owner: Any, name: str, part: str) -> None:
        plain = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return plain(*args, **kwargs)
            finally:
                seconds[part] += time.process_time() - began

        setattr(owner, name, wrapper)

    timed(encoding.Encoder, "collect", "encode")
    timed(gate.Gate, "check_split", "check")
    timed(encoder.Digests, "of", "digests")
    source = resolve_source(str(MODEL), None, False)
    tokenizer, vocabulary = load_tokenizer(source), load_config(source).vocab_size
    config = DataConfig(dataset=str(data), num_proc=processes, cache=cache, overlong="drop")
    context = EncodingContext(TASKS[task], "decoder", tokenizer, vocabulary, LengthBounds(8192), 42)
    before, used, began = peak_mib(1), cpu_seconds(), time.perf_counter()
    anonymous = anonymous_mib()
    with AnonymousPeak() as peak:
        prepared = prepare_data(config, context, encoder.ignore_progress)
    total = time.perf_counter() - began
    parts = {
        "gate_s": seconds["check"] + seconds["digests"],
        "encode_s": seconds["encode"] - seconds["digests"],
    }
    return {
        "rows": len(prepared.train), "tokens": prepared.facts["tokens"], "total_s": total,
        **parts, "mib": peak_mib(processes) - before,
        "anonymous_mib": peak.mib - anonymous, "cpu_s": cpu_seconds() - used,
        "findings": [f["name"] for f in prepared.facts["gate"]],
    }  # fmt: skip


def measure_trl(data: Path, processes: int) -> dict[str, Any]:
    """Let TRL's SFTTrainer prepare `data`; return figures."""
    import datasets
    import transformers
    import trl

    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    shape = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=len(tokenizer),
    )  # fmt: skip

    def prepare(count: int | None) -> float:
        with data.open(encoding="utf-8") as file:
            rows = [json.loads(line) for _, line in zip(range(count or 10**9), file, strict=False)]
        began = time.perf_counter()
        turns = datasets.Dataset.from_list(
            [{"prompt": [{"role": "user", "content": "Summarize the following text.\n\n"
                          + row["document"]}],
              "completion": [{"role": "assistant", "content": row["summary"]}]} for row in rows]
        )  # fmt: skip
        arguments = trl.SFTConfig(
            output_dir=tempfile.mkdtemp(), max_length=None, report_to="none", use_cpu=True,
            bf16=False, dataset_num_proc=processes if processes > 1 and count is None else None,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(shape)
        trl.SFTTrainer(model, arguments, train_dataset=turns, processing_class=tokenizer)
        return time.perf_counter() - began

    warm = min(prepare(1), prepare(1))
    before = peak_mib(1)
    total = prepare(None) - warm
    return {"total_s": total, "mib": peak_mib(processes) - before, "trl": trl.__version__}


def child(python: str, *arguments: str, cache: Path) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    environment = {
        **os.environ, "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT / "src"), "TQDM_DISABLE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [python, __file__, "--child", *arguments],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--trl-python", help="interpreter of an environment with TRL")
    parser.add_argument("--short", type=int, nargs="+", help="numbers of short rows, and no others")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, data, processes = options.child
        if what == "trl":
            figures = measure_trl(Path(data), int(processes))
        elif what == "short":
            figures = measure_ours(Path(data), int(processes), cache=False, task="text-generation")
        else:
            figures = measure_ours(Path(data), int(processes), cache=what == "cached")
        print(json.dumps(figures))
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(
        "| rows | what | processes | s | rows/s | gate CPU s (of encoding) | MiB "
        "| CPU s | anonymous MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for count in options.short or []:
            data = Path(folder) / f"short-{count}.jsonl"
            write_short_rows(data, count)
            for processes in options.processes:
                found = child(
                    sys.executable, "short", str(data), str(processes), cache=Path(folder)
                )
                show(count, "ftlevel, short rows", processes, found, gate_cost(found, processes))
        for count in [] if options.short else options.rows:
            data = Path(folder) / f"{count}.jsonl"
            write_rows(data, count)
            measure_all(data, count, options, Path(folder))


def measure_all(data: Path, count: int, options: Any, folder: Path) -> None:
    """Print the lines of one number of rows."""
    for processes in options.processes:
        kept = (
            "cached" if processes == options.processes[-1] else "plain"
        )  # the last keeps its rows
        found = child(sys.executable, kept, str(data), str(processes), cache=folder)
        show(count, "ftlevel", processes, found, gate_cost(found, processes))
    again = child(sys.executable, "cached", str(data), "1", cache=folder)
    show(count, "ftlevel, kept rows", 1, again, "")
    for processes in options.processes if options.trl_python else []:
        found = child(options.trl_python, "trl", str(data), str(processes), cache=folder)
        show(count, f"TRL {found['trl']}", processes, found, "")


def gate_cost(found: dict[str, Any], processes: int) -> str:
    """Return the CPU seconds of the gate and their ratio to those of encoding."""
    if processes > 1:
        return ""  # of which children took a part
    return f"{found['gate_s']:.2f} ({found['gate_s'] / found['encode_s']:.0%})"


def show(count: int, what: str, processes: int, found: dict[str, Any], gate: str) -> None:
    """Print a line of the table."""
    speed = count / found["total_s"]
    print(
        f"| {count:,} | {what} | {processes} | {found['total_s']:.2f} | {speed:,.0f} | {gate} "
        f"| {found['mib']:,.0f} | {found.get('cpu_s', 0):.1f} "
        f"| {found.get('anonymous_mib', 0):,.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
