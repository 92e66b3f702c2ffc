"""`python -m gpu_sim`: commands on a simulated CUDA device that computes, and figures of a step.

    python -m gpu_sim [--only TEXT …] [--sample] [--jobs 2] [--json FILE]
    python -m gpu_sim figures

Nothing is measured: the device computes on the CPU, and the figures come from fake tensors.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from pathlib import Path
from queue import Empty, SimpleQueue

from gpu_sim import device
from gpu_sim.commands import MEDIUM, SAMPLE, Cell, build_cells, without_dropout, write_files
from gpu_sim.compare import Result, Worker, compare


def main() -> int:
    """Run the cells; return 1 if something is wrong with one."""
    if sys.argv[1:] == ["figures"]:
        return device.run(sys.executable, "-m", "gpu_sim.figures")
    parser = argparse.ArgumentParser(prog="gpu_sim", description=__doc__)
    parser.add_argument("--only", nargs="*", help="parts of names of cells")
    parser.add_argument("--sample", action="store_true", help="the cells that CI runs")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--keep", type=Path, help="folder for the runs, kept")
    args = parser.parse_args()
    if reason := device.get_unavailable_reason():
        sys.exit(f"The simulation {reason}.")
    cells = [
        cell for cell in build_cells()
        if (not args.sample or cell.name in SAMPLE)
        and (not args.only or any(part in cell.name for part in args.only))
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        results = run_cells(cells, folder, args.jobs)
    failed = [result for result in results if result.problems]
    print(f"{len(cells)} cells, {len(failed)} with problems. Simulated, not measured.")
    if args.json:
        args.json.write_text(json.dumps([as_dict(result) for result in results], indent=1))
    return int(bool(failed))


def run_cells(cells: list[Cell], folder: Path, jobs: int) -> list[Result]:
    """Run `cells`, `jobs` at a time, in folders below `folder`; print a line per cell."""
    names = build_inputs(folder / "inputs")
    queue: SimpleQueue[Cell] = SimpleQueue()
    for cell in cells:
        queue.put(cell)
    results: list[Result] = []

    def work() -> None:
        card, cpu = Worker(True, names), Worker(False, names)
        while True:
            try:
                cell = queue.get_nowait()
            except Empty:
                break
            result = compare(cell, card, cpu, folder)
            results.append(result)
            verdict = "ok" if not result.problems else "; ".join(result.problems)
            seconds = result.card.seconds + result.cpu.seconds
            print(f"{cell.name:34} {result.distance:8.1e} {seconds:5.0f} s  {verdict}", flush=True)
        card.close()
        cpu.close()

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def build_inputs(folder: Path) -> dict[str, str]:
    """Write models and rows that the cells use; return name → path."""
    import transformers

    from tiny_models import FAMILIES, save_tiny

    transformers.utils.logging.disable_progress_bar()
    names = write_files(folder / "data")
    for family in FAMILIES:
        names[family] = str(save_tiny(folder / family, family, **without_dropout(family)))
    names["medium"] = str(save_tiny(folder / "medium", "llama", **MEDIUM))
    names["llama2"] = str(save_tiny(folder / "llama2", "llama", seed=2))
    return names


def as_dict(result: Result) -> dict[str, object]:
    """Return a result for JSON."""
    return {
        "cell": result.cell.name, "problems": result.problems, "distance": result.distance,
        "waits": result.card.waits, "peak": result.card.peak, "codes": result.card.codes,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
