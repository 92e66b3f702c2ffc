#!/usr/bin/env python3
"""Compare `ftlevel quantize` with transformers' load and save: time, CPU and memory.

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
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from measuring import MODEL, Usage, alternate, describe_machine, markdown, run, run_checked
from merge import make_large

LIMIT_BYTES = 1_500_000_000

IMPORTS = """
import bitsandbytes, torch, transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
"""
REFERENCE = (
    IMPORTS
    + """
import sys
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                            bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config,
                                             dtype="auto", device_map={"": "cpu"})
model.save_pretrained(sys.argv[2])
"""
)
CASES = {
    "`ftlevel quantize`": "import bitsandbytes, ftlevel.commands.quantize, ftlevel.cli.screen",
    "transformers, load and save": IMPORTS,
}
"""What each program imports before it reads the model."""


def command(name: str, source: Path, out: Path) -> list[str]:
    """Return the command that quantizes `source` to `out`."""
    if name == "`ftlevel quantize`":
        flags = ["--quant", "4bit", "--double-quant", "--no-measure", "--quiet", "--out", str(out)]
        return [sys.executable, "-m", "ftlevel", "quantize", str(source), *flags]
    return [sys.executable, "-c", REFERENCE, str(source), str(out)]


def compare(source: Path, runs: int, warm_ups: int = 1) -> str:
    """Return a table of medians over alternating runs on `source`."""

    def measure(name: str, out: Path) -> Usage:
        shutil.rmtree(out, ignore_errors=True)
        return run_checked(command(name, source, out))[0]

    with tempfile.TemporaryDirectory(prefix="ftlevel-quantize-") as folder:
        out = Path(folder) / "out"
        cases = {name: lambda name=name: measure(name, out) for name in CASES}  # type: ignore[misc]
        usages = alternate(cases, runs, warm_ups)
    rows = []
    for name, imports in CASES.items():
        wall, cpu, peak = (
            statistics.median(getattr(usage, key) for usage in usages[name])
            for key in ("wall", "cpu", "peak")
        )
        above = peak - run_checked([sys.executable, "-c", imports])[0].peak
        rows.append([name, f"{wall:.1f}", f"{cpu:.1f}", f"{peak / 1e6:.0f}", f"{above / 1e6:.0f}"])
    return markdown(["", "wall s", "CPU s", "peak private MB", "of it after the imports"], rows)


def under_limit(source: Path) -> Iterator[str]:
    """Quantize `source` under the memory limit by every case, and yield how each ended."""
    with tempfile.TemporaryDirectory(prefix="ftlevel-quantize-") as folder:
        for number, name in enumerate(CASES):
            out = Path(folder) / str(number)
            code, usage, output = run(command(name, source, out), LIMIT_BYTES)
            end = "done" if code == 0 else f"exited with {code}: {output.splitlines()[-1:]}"
            yield f"- {name}: {end} ({usage.wall:.1f} s, peak private {usage.peak / 1e6:.0f} MB)"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each")
    parser.add_argument("--large-runs", type=int, default=1, help="the same of the 3 GB model")
    parser.add_argument("--model", type=Path, default=MODEL, help="the small model")
    parser.add_argument("--no-large", action="store_true", help="leave the 3 GB model out")
    arguments = parser.parse_args(argv)
    if not Path("/proc/self/status").exists():
        parser.error("private memory is read from /proc, which does not exist here.")
    if not arguments.model.is_dir():
        parser.error(f"--model: {arguments.model} does not exist. See scripts/fetch_models.py.")
    print(
        f"{describe_machine()}; medians of {arguments.runs} alternating runs on the small model, "
        f"{arguments.large_runs} on the large one.\n\n{arguments.model.name}:\n",
        flush=True,
    )
    print(compare(arguments.model, arguments.runs), flush=True)
    if arguments.no_large:
        return
    with tempfile.TemporaryDirectory(prefix="ftlevel-large-") as folder:
        large = make_large(Path(folder) / "large")
        print("\nLlama of 3 GB in 10 shards:\n", flush=True)
        print(f"{compare(large, arguments.large_runs, 0)}\n", flush=True)
        print(f"The same under RLIMIT_DATA of {LIMIT_BYTES / 1e9:.1f} GB:\n")
        print("\n".join(under_limit(large)))


if __name__ == "__main__":
    main()
