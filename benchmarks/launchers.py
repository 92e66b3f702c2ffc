"""Compare our launcher of several processes with torch.distributed.run's, by what users see.

    python benchmarks/launchers.py

Each starts the same run in two processes; then something happens to it. Printed are the exit code,
the lines of stderr, the ranks that still run ten seconds later, how many checkpoints there are, and
the seconds until it trained. It takes about three minutes on two quiet cores. On Linux, with
psutil.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

LAUNCHERS = {
    "ftlevel": [sys.executable, "-m", "ftlevel", "train", "--num-processes", "2"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc-per-node", "2", "-m", "ftlevel", "train"],
}  # fmt: skip
RUN = ["--quiet", "--max-samples", "32", "--set", "data.max_eval_samples=8", "--max-steps", "4000",
       "--logging-steps", "1", "--batch-size", "2"]  # fmt: skip
EVENTS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGKILL", "a killed rank", "a wrong flag")


def try_out(launcher: str, event: str, folder: Path) -> str:
    """Return a row of the table."""
    wrong = ["--lora-r", "0"] if event == "a wrong flag" else []
    began = time.monotonic()
    process = subprocess.Popen(
        [*LAUNCHERS[launcher], *RUN, *wrong, "--output-dir", str(folder)], text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    log = folder / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size > 300):
        time.sleep(0.1)
    seconds = time.monotonic() - began
    ranks: list[psutil.Process] = []
    if process.poll() is None:
        ranks = psutil.Process(process.pid).children(recursive=True)
        if event == "a killed rank":
            ranks[-1].kill()
        else:
            process.send_signal(getattr(signal, event))
    try:
        _, err = process.communicate(timeout=60 if event != "SIGUSR1" else 10)
    except subprocess.TimeoutExpired:
        err = ""
    time.sleep(10)
    alive = [r for r in ranks if r.is_running() and r.status() != psutil.STATUS_ZOMBIE]
    whole = len(list(folder.glob("checkpoints/checkpoint-*/manifest.json")))
    code = process.poll()
    for left in (*alive, *([psutil.Process(process.pid)] if code is None else [])):
        left.kill()
    lines = len(err.strip().splitlines())
    return (
        f"| {event} | {launcher} | {'goes on' if code is None else code} | {lines} | "
        f"{len(alive)} | {whole} | {seconds:.0f} |"
    )


def main() -> None:
    """Print the table."""
    heads = ("what happens", "launcher", "exit code", "lines", "ranks alive", "checkpoints", "s")
    print(f"| {' | '.join(heads)} |")
    print("|---|---|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as root:
        for event in EVENTS:
            for launcher in LAUNCHERS:
                folder = Path(root) / f"{launcher}-{event.replace(' ', '-')}"
                print(try_out(launcher, event, folder), flush=True)


if __name__ == "__main__":
    main()
