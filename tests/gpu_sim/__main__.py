"""`python -m gpu_sim`: a table of figures with their bounds; `--sample` runs a few of them.

Nothing is measured: the GPU is simulated, and times come from a roofline model.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import traceback
import warnings
from typing import Any

from gpu_sim import card

SAMPLE = (
    "lora-llama-causal-none", "qlora-llama-causal-4bit", "dora-llama-causal-4bit",
    "prefix-llama-causal-none", "lora-bert-seqcls-none", "adapter-bert-seqcls-none",
    "lora-t5-seq2seq-none", "full-llama-causal-none",
)  # fmt: skip
"""Cells that CI runs."""


def main() -> int:
    """Print the figures, and return 1 if one exceeds its bound."""
    parser = argparse.ArgumentParser(prog="gpu_sim", description=__doc__)
    parser.add_argument("--sample", action="store_true", help="a few cells, and four layers")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if reason := card.get_unavailable_reason():
        sys.exit(f"The simulation {reason}.")
    gc.disable()  # until everything is imported
    card.install()
    from gpu_sim import figures
    from gpu_sim.cases import build_cells, run_cell
    from gpu_sim.simulate import find_undetected_errors

    gc.freeze()
    gc.enable()

    cells = [cell for cell in build_cells() if not args.sample or str(cell) in SAMPLE]
    failures: dict[str, str] = {}
    waits: dict[str, dict[str, int]] = {}
    for index, cell in enumerate(cells, 1):
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{index}/{len(cells)} {cell!s:60}")
        try:
            metrics = run_cell(cell)
            if metrics.waits:
                waits[str(cell)] = metrics.waits
        except RuntimeError as error:  # torch's error for tensors on different devices
            failures[str(cell)] = f"{error} ({traceback.extract_tb(error.__traceback__)[-1].name})"
    rows = figures.compute_figures(layers=4 if args.sample else 32)
    rows.insert(0, figures.Row("cells with tensors on two devices", len(failures), 0))
    rows.insert(1, figures.Row("cells whose step waits for the GPU", len(waits), 0))
    if args.json:
        summary: dict[str, Any] = {
            "cells": len(cells), "failures": failures, "waits": waits,
            "unseen": find_undetected_errors(),
        }  # fmt: skip
        print(json.dumps({**summary, "rows": [row.as_dict() for row in rows]}))
    else:
        print(f"{len(cells)} cells (method, model kind, quantization). Simulated, not measured.")
        print(figures.format_table(rows))
        for title, details in (("tensors on two devices", failures), ("waits", waits)):
            for name, detail in details.items():
                print(f"{title}: {name}: {detail}")
    return int(any(not row.is_met for row in rows))


if __name__ == "__main__":
    sys.exit(main())
