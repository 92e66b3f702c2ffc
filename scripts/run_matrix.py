"""Train every supported combination of family, task, method and base in tiny models.

    python scripts/run_matrix.py                     everything
    python scripts/run_matrix.py --families gpt2,t5 --rows lora,oft --quants none
    python scripts/run_matrix.py --json FILE         also write every outcome

Each cell that `ftlevel list-methods` supports is trained, saved, loaded into a fresh base and
compared; each unsupported cell must have its reason. Prints the number of cells that differ from
the table, which must be 0.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


def main() -> int:
    """Run the selected cells; return 1 if one differs from the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for option in ("families", "rows", "quants", "heads"):
        parser.add_argument(f"--{option}", help="comma-separated names; all by default")
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    args = parser.parse_args()

    import torch

    from ftlevel.models.loading import silence_loggers

    cells_of = importlib.import_module("matrix_cells")  # in tests/

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = {option: (getattr(args, option) or "").split(",") for option in
             ("families", "rows", "quants", "heads")}  # fmt: skip

    def is_selected(cell: Any) -> bool:
        values = (("families", cell.family), ("rows", cell.row),
                 ("quants", cell.quant), ("heads", cell.head))  # fmt: skip
        return all(names[option] == [""] or value in names[option] for option, value in values)

    cells = [cell for cell in cells_of.build_cells() if is_selected(cell)]
    start = time.perf_counter()
    outcomes: dict[Any, str] = {}
    with silence_loggers():
        for index, cell in enumerate(cells, 1):
            outcomes[cell] = cells_of.outcome(cell)
            if outcomes[cell].startswith("??"):
                print(f"{cell}: {outcomes[cell]}", file=sys.stderr, flush=True)
            if sys.stderr.isatty() and index % 20 == 0:
                print(f"\r{index:,} of {len(cells):,}", end="", file=sys.stderr)
    if args.json:
        lines = {str(cell): [list(cell.tasks), text] for cell, text in outcomes.items()}
        args.json.write_text(json.dumps(lines, indent=1, ensure_ascii=False), encoding="utf-8")
    print_table(outcomes)
    unexplained = sum(text.startswith("??") for text in outcomes.values())
    trained = sum(text == "yes" for text in outcomes.values())
    refused = len(outcomes) - trained - unexplained
    print(f"\n{len(outcomes):,} cells in {time.perf_counter() - start:,.0f} s: {trained:,} trained "
          f"and reloaded, {refused:,} refused, {unexplained:,} unexplained")  # fmt: skip
    return 1 if unexplained else 0


def print_table(outcomes: dict[Any, str]) -> None:
    """Print a line per row and quantization, and a letter per family.

    + trained, - refused, ? differs from the table.
    """
    columns = list(dict.fromkeys((cell.family, cell.head) for cell in outcomes))
    lines = list(dict.fromkeys((cell.row, cell.quant) for cell in outcomes))
    marks = {
        (cell.row, cell.quant, cell.family, cell.head): "?" if text[0] == "?" else
        "+" if text == "yes" else "-"
        for cell, text in outcomes.items()
    }  # fmt: skip
    print("columns: " + ", ".join(f"{family} {head}" for family, head in columns) + "\n")
    for row, quant in sorted(lines, key=lambda line: (line[1], lines.index(line))):
        text = "".join(marks.get((row, quant, *column), " ") for column in columns)
        print(f"{row:<11} {quant:<5} {text}")


if __name__ == "__main__":
    sys.exit(main())
