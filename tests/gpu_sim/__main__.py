"""`python -m gpu_sim`: the table of figures beside their bounds; with `--sample` a few of them.

Nothing here is measured: a card is simulated, and times are those of a roofline.
"""

from __future__ import annotations

import argparse
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
"""Of the cells, in CI."""


def main() -> int:
    """Print the figures, and return 1 where one is beyond its bound."""
    parser = argparse.ArgumentParser(prog="gpu_sim", description=__doc__)
    parser.add_argument("--sample", action="store_true", help="a few cells, and four layers")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    if reason := card.why_not():
        sys.exit(f"The simulation {reason}.")
    card.put_in()
    from gpu_sim import figures
    from gpu_sim.cases import build_cells, run_cell
    from gpu_sim.simulate import find_unseen_faults

    cells = [cell for cell in build_cells() if not asked.sample or str(cell) in SAMPLE]
    failures: dict[str, str] = {}
    waits: dict[str, dict[str, int]] = {}
    for number, cell in enumerate(cells, 1):
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{number}/{len(cells)} {cell!s:60}")
        try:
            found = run_cell(cell)
            if found.waits:
                waits[str(cell)] = found.waits
        except RuntimeError as error:  # what torch raises where tensors are not together
            failures[str(cell)] = f"{error} ({traceback.extract_tb(error.__traceback__)[-1].name})"
    rows = figures.of_large(layers=4 if asked.sample else 32)
    rows.insert(0, figures.Row("cells with tensors on two devices", len(failures), 0))
    rows.insert(1, figures.Row("cells whose step waits for the card", len(waits), 0))
    if asked.json:
        told: dict[str, Any] = {
            "cells": len(cells), "failures": failures, "waits": waits,
            "unseen": find_unseen_faults(),
        }  # fmt: skip
        print(json.dumps({**told, "rows": [row.as_dict() for row in rows]}))
    else:
        print(f"{len(cells)} cells of method, kind of model and base. Simulated, not measured.")
        print(figures.format_table(rows))
        for title, found in (("tensors on two devices", failures), ("waits", waits)):
            for name, what in found.items():
                print(f"{title}: {name}: {what}")
    return int(any(not row.is_met for row in rows))


if __name__ == "__main__":
    sys.exit(main())
