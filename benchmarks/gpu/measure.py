"""Compare ftlevel with a plain Trainer + PEFT script and TRL on a random Llama-3-8B, on a GPU.

    python -m gpu.measure lora|qlora --out FOLDER --until TIME     (by run.py of the kit)

For each shape of rows (rows.py) every tool runs once, in a process of its own, under the meter of
`benchmarks/train.py`: real tokens a second, MFU, peak memory and loss mean what they mean there.
After each run FOLDER/LINE.json and FOLDER/LINE.md are written anew, so that a call that is cut off
counts; what they hold is not measured again. Last, a step of ftlevel is traced (trace.py).
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
    """Return `trl sft` with the fused kernels of liger.

    Raises:
        UnsupportedError: they cannot run here.
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
"""In the order in which they run."""


def python_of(tool: tools.Tool) -> str:
    """Return the python that a tool's command is found beside."""
    site = os.environ.get("FTLEVEL_GPU_SITE")
    return str(Path(site) / "bin" / "python") if tool.peer and site else sys.executable


class Measurements:
    """The file of one line, as it grows.

    Attributes:
        path: of the JSON; the table stands beside it.
        found: its content: `machine`, the `peak_flops` of its products, and by shape what
            `workload_table` takes.
    """

    def __init__(self, path: Path, earlier: Path | None) -> None:
        """Go on with what `path` holds, or else the file of that name in `earlier`."""
        self.path = path
        places = [path, *([earlier / path.name] if earlier else [])]
        texts = [place.read_text(encoding="utf-8") for place in places if place.is_file()]
        self.found: dict[str, Any] = json.loads(texts[0]) if texts else {"shapes": {}}
        self.found["machine"] = describe_card()

    def has(self, name: str, tool: tools.Tool) -> bool:
        """Return whether `tool` has run, or was refused, on a shape."""
        result = self.found["shapes"].get(name, {"readings": {}, "refused": {}})
        return tool.name in result["readings"] or tool.name in result["refused"]

    def shape(self, name: str, work: Work) -> dict[str, Any]:
        """Return what is known of a shape; the machine's peak is measured once."""
        shapes = self.found["shapes"]
        if name not in shapes:
            if "peak_flops" not in self.found:
                self.found["peak_flops"] = measure_peak(work)
            shapes[name] = {
                "work": asdict(work), "rounds": 1, "peak_flops": self.found["peak_flops"],
                "weights": count_weights(Path(work.model), has_head=True), "tools": {},
                "readings": {}, "refused": {},
            }  # fmt: skip
        return shapes[name]  # type: ignore[no-any-return]

    def write(self) -> None:
        """Write the JSON and the table anew; a cut leaves the old ones or the new ones."""
        tables = []
        for result in self.found["shapes"].values():
            readings = {k: [Reading(**r) for r in taken] for k, taken in result["readings"].items()}
            result["tools"] = summarize(readings, result["weights"], result["peak_flops"])
            tables.append(workload_table(result))
        text = json.dumps(self.found, indent=1)
        page = "\n\n".join([self.found["machine"] + "; one run each.", *tables]) + "\n"
        for place, content in ((self.path, text), (self.path.with_suffix(".md"), page)):
            partial = place.with_name(place.name + ".partial")
            partial.write_text(content, encoding="utf-8")
            partial.replace(place)


def describe_card() -> str:
    """Return the machine in words, with its GPU and the version of torch."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{describe_machine()}; {card}; torch {torch.__version__}"


def measure_tool(tool: tools.Tool, work: Work, folder: Path, seconds: float) -> Reading:
    """Run one tool once.

    Raises:
        UnsupportedError: it has no way to do the work.
        FailedRunError: it failed, or `seconds` were over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = tool.command(work, folder, python_of(tool))
    if not Path(command[0]).is_file():
        raise tools.UnsupportedError(f"{command[0]} is not there")
    return run_metered(command, folder, tool.environment, limit_seconds=seconds)


def measure_shape(name: str, work: Work, kept: Measurements, folder: Path, until: float) -> bool:
    """Run the tools that `kept` has no reading of; return whether none is left."""
    for tool in TOOLS:
        if kept.has(name, tool):
            continue
        left = until - time.time() - SPARE_SECONDS
        if left <= 0:
            return False
        result = kept.shape(name, work)
        place = folder / f"{name}-{tool.name.replace(' ', '-').replace(',', '')}"
        try:
            reading = measure_tool(tool, work, place, left)
        except tools.UnsupportedError as error:
            result["refused"][tool.name] = str(error)
        except FailedRunError as error:
            if time.time() > until - SPARE_SECONDS:
                return False  # ended by us: the next call runs it again
            result["refused"][tool.name] = str(error)
        else:
            result["readings"][tool.name] = [asdict(reading)]
        kept.write()
        said = result["tools"].get(tool.name)
        print(f"{work.name}: {tool.name}: " + (
            f"{said['tokens_per_s']:,.0f} tokens/s, MFU {said['mfu']:.2f}, "
            f"peak {said['peak_mib'] / 1024:.1f} GiB, loss {said['loss']:.4f}"
            if said else result["refused"][tool.name]), flush=True)  # fmt: skip
    return True


def trace(work: Work, line: str, out: Path, folder: Path, seconds: float) -> bool:
    """Trace a step of ftlevel into `out`; return whether it is there."""
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
    """Measure until the time is over; 0 if nothing is left to do, 75 if the line must run again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("line", choices=("lora", "qlora"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--earlier", type=Path)
    asked = parser.parse_args()
    kept = Measurements(asked.out / f"{asked.line}.json", asked.earlier)
    scratch = Path(tempfile.gettempdir()) / "ftlevel-gpu-kit"
    model = scratch / ("tiny" if asked.tiny else "llama-3-8b")
    scratch.mkdir(exist_ok=True)
    write_llama(model, "cpu" if asked.tiny else "cuda", tiny=asked.tiny)
    torch.cuda.empty_cache()
    quant = "4bit" if asked.line == "qlora" else "none"
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        works = {s: build(s, quant, model, Path(temporary) / s, tiny=asked.tiny) for s in SHAPES}
        is_whole = True
        for name, work in works.items():
            is_whole &= measure_shape(name, work, kept, Path(temporary), asked.until)
        left = asked.until - time.time() - SPARE_SECONDS
        is_whole &= trace(works["2k"], asked.line, asked.out, Path(temporary), left)
    print(f"{kept.path.with_suffix('.md')}: " + (
        "whole" if is_whole else "cut off; the same line again goes on"), flush=True)  # fmt: skip
    return 0 if is_whole else 75


if __name__ == "__main__":
    raise SystemExit(main())
