"""Run a command once for each process of a run, and end them together.

The processes meet as torchrun's do, by the same environment variables. torchrun itself tears them
down at Ctrl-C before a checkpoint is written, loses their exit code and ends in tracebacks of its
own; `accelerate launch --cpu` starts one process whatever number it is given.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0


def is_launched() -> bool:
    """Whether a launcher has started this process, ours or torchrun."""
    return "LOCAL_RANK" in os.environ


def is_follower() -> bool:
    """Whether another process of the run speaks for this one."""
    return is_launched() and os.environ.get("RANK", "0") != "0"


def launch(arguments: Sequence[str], count: int) -> int:
    """Run `ftlevel` with these `arguments` in `count` processes and return the exit code.

    It is the first process's, or that of the first one that failed; the others are then stopped.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shared = {
        "OMP_NUM_THREADS": str(max(1, (cores or 1) // count)),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    command = [sys.executable, "-m", "ftlevel", *arguments]
    running = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for process in running:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(running)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(running: Sequence[subprocess.Popen[bytes]]) -> int:
    """Return the exit code of them all; when one fails, stop the others."""
    while any(process.poll() is None for process in running):
        failed = [code for process in running if (code := process.poll())]
        if failed:
            _stop(running)
            first = running[0].returncode
            return abs(first if first and first > 0 else failed[0])
        time.sleep(_POLL_SECONDS)
    return abs(next((process.returncode for process in running if process.returncode), 0))


def _stop(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Give the others a moment to see for themselves, then end them."""
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in running:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()  # it waits for the one that is gone
            process.wait()
