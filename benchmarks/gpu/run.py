#!/usr/bin/env python3
"""Install the kit on the GPU machine, and run one of its commands.

    python3 run.py tests            what only a card can prove: tests/gpu
    python3 run.py lora             tokens/s, MFU and peak memory of LoRA in bfloat16; a trace
    python3 run.py qlora            the same on a base in 4 bits
    python3 run.py LINE --tiny      the same code on a CPU and a model of two layers

Needs nothing but Python's own library; what it expects to be installed is in EXPECTED. Results go
to the folder --out (default: $OUT, else `results` beside this file) as they come; the same line
again goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
LINES = {"tests": "prove", "lora": "measure", "qlora": "measure"}
EXPECTED = (
    "torch", "numpy", "pyarrow", "huggingface_hub", "safetensors", "tokenizers", "jinja2", "regex",
    "tqdm", "filelock", "fsspec", "packaging", "pip",
)  # fmt: skip
"""What a machine with torch and transformers has, and the kit leaves out."""
SECONDS = 560


def install(python: str) -> Path:
    """Install the wheels that were carried into a folder of their own, once, and return it."""
    site = HERE / "site"
    if not (site / "whole").is_file():
        wheels = sorted(str(path) for path in (HERE / "wheels").glob("*.whl"))
        command = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
                   "--upgrade", "--target", str(site), *wheels]  # fmt: skip
        subprocess.run(command, check=True)
        (site / "whole").touch()
    return site


def main() -> int:
    """Install, run, and return the exit code of what ran."""
    began = time.time()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("line", choices=LINES)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or HERE / "results"))
    parser.add_argument("--earlier", type=Path, help="results of a call that was cut off elsewhere")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="begin nothing after these")
    parser.add_argument("--tiny", action="store_true", help="try the kit on a CPU")
    asked = parser.parse_args()
    missing = [name for name in EXPECTED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {sys.executable} has no {', '.join(missing)}; the kit does not carry that. "
              f"Use a Python that has {', '.join(EXPECTED)}.", file=sys.stderr)  # fmt: skip
        return 2
    site = install(sys.executable)
    out = asked.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    tree = HERE / "tree"
    inherited = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    places = [str(site), str(tree / "src"), str(tree / "benchmarks"), *inherited]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(places),
        "HF_HUB_OFFLINE": "1", "FTLEVEL_GPU_SITE": str(site),
    }  # fmt: skip
    command = [
        sys.executable, "-m", f"gpu.{LINES[asked.line]}", asked.line, "--out", str(out),
        "--until", str(began + asked.seconds), *(["--tiny"] if asked.tiny else []),
        *(["--earlier", str(asked.earlier.absolute())] if asked.earlier else []),
    ]  # fmt: skip
    return subprocess.run(command, env=environment, cwd=tree, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
