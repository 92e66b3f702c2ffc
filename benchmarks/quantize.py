#!/usr/bin/env python3
"""What `ftlevel quantize` takes beside transformers' load and save: time, processor, memory.

    python benchmarks/quantize.py
    python benchmarks/quantize.py --runs 5 --no-large

Whole processes, in turns; on the small model after a run each that does not count. Memory is the
private memory of a process (RssAnon, polled every 5 ms) at its peak, and what of it came after the
imports: files that are mapped are not private, and go when memory is short. The large model is a
Llama of about 3 GB in 10 shards with random weights, made in a temporary directory and removed at
the end; it is quantized once more by each under `RLIMIT_DATA`, which limits what a process may
allocate or map for writing, imports included, and needs no rights.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from merge import make_large
from startup import MODEL, describe_machine

LIMIT_BYTES = 1_500_000_000

IMPORTS = """
import bitsandbytes, torch, transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
"""
REFERENCE = (
    IMPORTS
    + """
import sys
wish = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                          bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=wish,
                                             dtype="auto", device_map={"": "cpu"})
model.save_pretrained(sys.argv[2])
"""
)
OWN_IMPORTS = "import bitsandbytes, ftlevel.commands.quantize, ftlevel.cli.screen"


@dataclass(frozen=True)
class Usage:
    """Seconds of wall clock and processor, and the peak of private memory in bytes."""

    wall: float
    cpu: float
    peak: int


@dataclass
class Case:
    """A way to quantize; `command` is given the source and the output."""

    name: str
    command: Callable[[Path, Path], list[str]]
    imports: str
    usages: list[Usage] = field(default_factory=list)
    imports_peak: int = 0


CASES = (
    ("`ftlevel quantize`", lambda source, out: [
        sys.executable, "-m", "ftlevel", "quantize", str(source), "--quant", "4bit",
        "--double-quant", "--no-measure", "--quiet", "--out", str(out)], OWN_IMPORTS),
    ("transformers, load and save", lambda source, out: [
        sys.executable, "-c", REFERENCE, str(source), str(out)], IMPORTS),
)  # fmt: skip


def run(command: Sequence[str], limit: int | None = None) -> tuple[int, Usage, str]:
    """Run `command`; return its exit code, what it used, and the end of what it said."""

    def lower_limit() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, env=environment, preexec_fn=lower_limit
        )
        while process.poll() is None:
            peak = max(peak, private_bytes(process.pid))
            time.sleep(0.005)
        wall = time.perf_counter() - began
        said.seek(0)
        words = said.read().decode(errors="replace").strip().splitlines()[-1:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return process.returncode, Usage(wall, cpu, peak), " ".join(words)


def private_bytes(pid: int) -> int:
    """Return the private memory of a process in bytes, 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def compare(source: Path, runs: int, warm_ups: int = 1) -> list[Case]:
    """Measure every case on `source`, in turns, after runs that do not count."""
    cases = [Case(*fields) for fields in CASES]
    with tempfile.TemporaryDirectory(prefix="ftlevel-quantize-") as temporary:
        out = Path(temporary) / "out"
        for number in range(runs + warm_ups):
            for case in cases:
                code, usage, said = run(case.command(source, out))
                if code:
                    raise SystemExit(f"error: {case.name} ended with {code}: {said}")
                shutil.rmtree(out)
                if number >= warm_ups:
                    case.usages.append(usage)
    for case in cases:
        case.imports_peak = run([sys.executable, "-c", case.imports])[1].peak
    return cases


def table(cases: Sequence[Case]) -> str:
    """Return a Markdown table of medians."""
    lines = ["| | wall s | processor s | peak private MB | of it after the imports |",
             "|---|--:|--:|--:|--:|"]  # fmt: skip
    for case in cases:
        wall, cpu, peak = (
            statistics.median(getattr(usage, name) for usage in case.usages)
            for name in ("wall", "cpu", "peak")
        )
        above = (peak - case.imports_peak) / 1e6
        lines.append(f"| {case.name} | {wall:.1f} | {cpu:.1f} | {peak / 1e6:.0f} | {above:.0f} |")
    return "\n".join(lines)


def under_limit(source: Path) -> Iterator[str]:
    """Quantize `source` under the memory limit by every case, and say how each ended."""
    with tempfile.TemporaryDirectory(prefix="ftlevel-quantize-") as temporary:
        for number, (name, command, _) in enumerate(CASES):
            code, usage, said = run(command(source, Path(temporary) / str(number)), LIMIT_BYTES)
            end = "done" if code == 0 else f"ended with {code}: {said}"
            yield f"- {name}: {end} ({usage.wall:.1f} s, peak private {usage.peak / 1e6:.0f} MB)"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print Markdown, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each")
    parser.add_argument("--large-runs", type=int, default=1, help="the same of the 3 GB model")
    parser.add_argument("--model", type=Path, default=MODEL, help="the small model")
    parser.add_argument("--no-large", action="store_true", help="leave the 3 GB model out")
    arguments = parser.parse_args(argv)
    if not Path("/proc/self/status").exists():
        parser.error("private memory is read from /proc, which is not here.")
    if not arguments.model.is_dir():
        parser.error(f"--model: {arguments.model} is not there. See scripts/fetch_models.py.")
    print(
        f"{describe_machine()}; medians of {arguments.runs} runs in turns on the small model, "
        f"{arguments.large_runs} on the large one.\n",
        flush=True,
    )
    print(
        f"{arguments.model.name}:\n\n{table(compare(arguments.model, arguments.runs))}\n",
        flush=True,
    )
    if arguments.no_large:
        return 0
    with tempfile.TemporaryDirectory(prefix="ftlevel-large-") as temporary:
        large = make_large(Path(temporary) / "large")
        print("Llama of 3 GB in 10 shards:\n", flush=True)
        print(f"{table(compare(large, arguments.large_runs, 0))}\n", flush=True)
        print(f"The same under RLIMIT_DATA of {LIMIT_BYTES / 1e9:.1f} GB:\n")
        print("\n".join(under_limit(large)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
