#!/usr/bin/env python3
"""Install the kit on the GPU machine, and run one of its commands.

    python3 run.py smoke            README commands, three steps each (half a minute): run it first
    python3 run.py tests            tests that need a GPU: tests/gpu
    python3 run.py lora             tokens/s, MFU and peak memory of LoRA in bfloat16; a trace
    python3 run.py qlora            the same on a 4-bit base
    python3 run.py LINE --tiny      the same code on a CPU and a model of two layers

Needs only Python's standard library and the packages of EXPECTED. Results are saved to --out
(default: $OUT, else `results` beside this file) as they come; run an interrupted line again to
continue it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

DIRECTORY = Path(__file__).resolve().parent
LINES = {"smoke": "prove", "tests": "prove", "lora": "measure", "qlora": "measure"}
EXPECTED = (
    "torch", "numpy", "pyarrow", "huggingface_hub", "safetensors", "tokenizers", "jinja2", "regex",
    "tqdm", "filelock", "fsspec", "packaging", "pip",
)  # fmt: skip
"""Packages of a machine with torch and transformers, which the kit does not include."""
SECONDS = 560


def install(python: str) -> Path:
    """Install the kit's wheels into a directory, once, and return it."""
    site = DIRECTORY / "site"
    if not (site / "whole").is_file():
        wheels = sorted(str(path) for path in (DIRECTORY / "wheels").glob("*.whl"))
        command = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
                   "--upgrade", "--target", str(site), *wheels]  # fmt: skip
        subprocess.run(command, check=True)
        (site / "whole").touch()
    return site


def main() -> int:
    """Install, run a command, and return its exit code."""
    start = time.time()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("line", choices=LINES)
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or DIRECTORY / "results")
    )
    parser.add_argument("--earlier", type=Path, help="results of an interrupted call elsewhere")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="time limit for starting work"
    )
    parser.add_argument("--tiny", action="store_true", help="try the kit on a CPU")
    args = parser.parse_args()
    missing = [name for name in EXPECTED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {sys.executable} has no {', '.join(missing)}; the kit lacks that. "
              f"Use a Python that has {', '.join(EXPECTED)}.", file=sys.stderr)  # fmt: skip
        return 2
    site = install(sys.executable)
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    tree = DIRECTORY / "tree"
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = [str(site), str(tree / "src"), str(tree / "benchmarks"), *inherited]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1", "FTLEVEL_GPU_SITE": str(site),
    }  # fmt: skip
    command = [
        sys.executable, "-m", f"gpu.{LINES[args.line]}", args.line, "--out", str(out),
        "--until", str(start + args.seconds), *(["--tiny"] if args.tiny else []),
        *(["--earlier", str(args.earlier.absolute())] if args.earlier else []),
    ]  # fmt: skip
    return subprocess.run(command, env=environment, cwd=tree, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
