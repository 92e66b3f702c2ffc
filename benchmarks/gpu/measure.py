"""Compare ftlevel with a plain Trainer + PEFT script and TRL on a random Llama-3-8B, on a GPU.

    python -m gpu.measure lora|qlora --out FOLDER --until TIME     (run by run.py of the kit)

For each shape of rows (rows.py), every tool runs once in a separate process, with the meter and the
values of `benchmarks/train.py`. FOLDER/LINE.json and FOLDER/LINE.md are updated after each run, so
an interrupted call keeps its results, and the next call continues. Finally, a step of ftlevel is
traced (trace.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measuring import describe_machine
from train import measure_peak
from training import tools
from training.runs import FailedRunError, Reading, run_metered
from training.tables import summarize, workload_table
from training.workloads import Work, count_weights

from gpu.model import write_llama
from gpu.rows import SHAPES, build

TRACE = Path(__file__).resolve().parent / "trace.py"
SPARE_SECONDS = 5


def trl_with_liger(work: Work, folder: Path, python: str) -> list[str]:
    """Return `trl sft` with liger kernels.

    Raises:
        UnsupportedError: they are not available here.
    """
    if work.device != "cuda" or importlib.util.find_spec("triton") is None:
        raise tools.UnsupportedError("liger's kernels need a GPU and triton")
    return tools.trl(work, folder, python, "--use_liger_kernel", "true")


TOOLS = (
    tools.Tool("ftlevel", tools.ftlevel),
    tools.Tool("plain", tools.plain),
    tools.Tool("trl", tools.trl, "trl"),
    tools.Tool("trl, liger", trl_with_liger, "trl"),
)
"""Tools in the order of their runs."""


def python_of(tool: tools.Tool) -> str:
    """Return the Python whose directory has the tool's command."""
    site = os.environ.get("FTLEVEL_GPU_SITE")
    return str(Path(site) / "bin" / "python") if tool.peer and site else sys.executable


class Measurements:
    """The results of one line: `machine`, `peak_flops`, and per shape readings and errors."""

    def __init__(self, path: Path, earlier: Path | None) -> None:
        """Load the results of `path`, or of the file with that name in `earlier`."""
        self.path = path
        paths = [path, *([earlier / path.name] if earlier else [])]
        texts = [file.read_text(encoding="utf-8") for file in paths if file.is_file()]
        self.results: dict[str, Any] = json.loads(texts[0]) if texts else {"shapes": {}}
        self.results["machine"] = describe_card()

    def has(self, name: str, tool: tools.Tool) -> bool:
        """Return whether a shape has a result of `tool`."""
        result = self.results["shapes"].get(name, {"readings": {}, "refused": {}})
        return tool.name in result["readings"] or tool.name in result["refused"]

    def shape(self, name: str, work: Work) -> dict[str, Any]:
        """Return the results of a shape; the machine's peak is measured once."""
        shapes = self.results["shapes"]
        if name not in shapes:
            if "peak_flops" not in self.results:
                self.results["peak_flops"] = measure_peak(work)
            shapes[name] = {
                "work": asdict(work), "rounds": 1, "peak_flops": self.results["peak_flops"],
                "weights": count_weights(Path(work.model), has_head=True), "tools": {},
                "readings": {}, "refused": {},
            }  # fmt: skip
        return shapes[name]  # type: ignore[no-any-return]

    def write(self) -> None:
        """Write the JSON file and the table atomically."""
        tables = []
        for result in self.results["shapes"].values():
            readings = {k: [Reading(**r) for r in runs] for k, runs in result["readings"].items()}
            result["tools"] = summarize(readings, result["weights"], result["peak_flops"])
            tables.append(workload_table(result))
        text = json.dumps(self.results, indent=1)
        page = "\n\n".join([self.results["machine"] + "; one run each.", *tables]) + "\n"
        for path, content in ((self.path, text), (self.path.with_suffix(".md"), page)):
            partial = path.with_name(path.name + ".partial")
            partial.write_text(content, encoding="utf-8")
            partial.replace(path)


def describe_card() -> str:
    """Return a description of the machine with its GPU and the version of torch."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{describe_machine()}; {card}; torch {torch.__version__}"


def measure_tool(tool: tools.Tool, work: Work, folder: Path, seconds: float) -> Reading:
    """Run one tool once.

    Raises:
        UnsupportedError: the tool does not support the workload.
        FailedRunError: it failed or timed out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = tool.command(work, folder, python_of(tool))
    if not Path(command[0]).is_file():
        raise tools.UnsupportedError(f"{command[0]} is not there")
    return run_metered(command, folder, tool.environment, limit_seconds=seconds)


def measure_shape(
    name: str, work: Work, measurements: Measurements, folder: Path, until: float
) -> bool:
    """Run the tools without a result in `measurements`; return whether all have one."""
    for tool in TOOLS:
        if measurements.has(name, tool):
            continue
        seconds = until - time.time() - SPARE_SECONDS
        if seconds <= 0:
            return False
        result = measurements.shape(name, work)
        run_dir = folder / f"{name}-{tool.name.replace(' ', '-').replace(',', '')}"
        try:
            reading = measure_tool(tool, work, run_dir, seconds)
        except tools.UnsupportedError as error:
            result["refused"][tool.name] = str(error)
        except FailedRunError as error:
            if time.time() > until - SPARE_SECONDS:
                return False  # stopped by the time limit: the next call runs it again
            result["refused"][tool.name] = str(error)
        else:
            result["readings"][tool.name] = [asdict(reading)]
        measurements.write()
        row = result["tools"].get(tool.name)
        print(f"{work.name}: {tool.name}: " + (
            f"{row['tokens_per_s']:,.0f} tokens/s, MFU {row['mfu']:.2f}, "
            f"peak {row['peak_mib'] / 1024:.1f} GiB, loss {row['loss']:.4f}"
            if row else result["refused"][tool.name]), flush=True)  # fmt: skip
    return True


def trace(work: Work, line: str, out: Path, folder: Path, seconds: float) -> bool:
    """Trace a step of ftlevel into `out`; return whether the trace exists."""
    base = out / f"{line}-trace"
    if base.with_suffix(".txt").is_file():
        return True
    if seconds <= 0:
        return False
    command = tools.ftlevel(work, folder / "traced", sys.executable)
    command[1:3] = [str(TRACE), str(base)]
    try:
        run_metered(command, folder / "traced", limit_seconds=seconds)
    except FailedRunError as error:
        print(f"trace: {error}", flush=True)
        return False
    return base.with_suffix(".txt").is_file()


def main() -> int:
    """Measure until the time limit; return 0 if all is done, 75 if the line must run again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("line", choices=("lora", "qlora"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--earlier", type=Path)
    args = parser.parse_args()
    measurements = Measurements(args.out / f"{args.line}.json", args.earlier)
    scratch = Path(tempfile.gettempdir()) / "ftlevel-gpu-kit"
    model = scratch / ("tiny" if args.tiny else "llama-3-8b")
    scratch.mkdir(exist_ok=True)
    write_llama(model, "cpu" if args.tiny else "cuda", tiny=args.tiny)
    torch.cuda.empty_cache()
    quant = "4bit" if args.line == "qlora" else "none"
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        works = {s: build(s, quant, model, Path(temporary) / s, tiny=args.tiny) for s in SHAPES}
        is_complete = True
        for name, work in works.items():
            is_complete &= measure_shape(name, work, measurements, Path(temporary), args.until)
        seconds = args.until - time.time() - SPARE_SECONDS
        is_complete &= trace(works["2k"], args.line, args.out, Path(temporary), seconds)
    print(f"{measurements.path.with_suffix('.md')}: " + (
        "complete" if is_complete else "incomplete; run this line again"), flush=True)  # fmt: skip
    return 0 if is_complete else 75


if __name__ == "__main__":
    raise SystemExit(main())
