"""Run a command once for each process of a run, and end them together.

The processes meet as torchrun's do, by the same environment variables; other launchers can start
them too (`ftlevel.world`). What is better here is measured by `benchmarks/launchers.py`
(docs/reliability.md): the exit code and the words of a failure, SIGUSR1, a launcher that is killed,
and the time until it begins. `accelerate launch --cpu` starts one process, whatever it is given.
"""

from __future__ import annotations

import ctypes
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
_PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # Windows has not all of them
_PR_SET_PDEATHSIG = 1
_FAILED = 1
_RESUME, _REPLACES = "--resume", ("--overwrite", "--overwrite-output-dir")


def launch(arguments: Sequence[str], count: int, restarts: int = 0) -> int:
    """Run `ftlevel` with these `arguments` in `count` processes and return the exit code.

    It is the first process's, or that of the first one that failed; the others are then stopped,
    and one that was killed is named. They end with this process, too, as by SIGTERM (on Linux).

    Args:
        arguments: of the command line.
        count: of processes.
        restarts: how often a run that failed (exit code 1) goes on with `--resume`; one that was
            ended by a signal to this process, or was given wrong (2), does not.
    """
    told: list[int] = []
    while True:
        code = _launch_once(arguments, count, told)
        is_told = set(told) - {getattr(signal, "SIGUSR1", None)}  # which ends nothing
        if code != _FAILED or is_told or not restarts:
            return code
        restarts -= 1
        arguments = _going_on(arguments)
        sys.stderr.write(
            f"ftlevel: it is started again with --resume; {restarts:,} restarts are left.\n"
        )


def _going_on(arguments: Sequence[str]) -> list[str]:
    """Return the command line that goes on with the run that `arguments` began."""
    kept = [a for a in arguments if a.replace("_", "-") not in _REPLACES]
    return kept if _RESUME in kept else [*kept, _RESUME]


def _launch_once(arguments: Sequence[str], count: int, told: list[int]) -> int:
    """Run the processes to their end; signals that were passed on are added to `told`."""
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
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
        for rank in range(count)
    ]

    def pass_on(number: int, _frame: FrameType | None) -> None:
        told.append(number)
        for process in running:
            process.send_signal(number)

    numbers = [n for n in (getattr(signal, name, None) for name in _PASSED_ON) if n is not None]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        return _wait(running)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(running: Sequence[subprocess.Popen[bytes]]) -> int:
    """Return the exit code of them all; when one fails, stop the others."""
    while any(process.poll() is None for process in running):
        failed = {rank: code for rank, process in enumerate(running) if (code := process.poll())}
        if failed:
            _stop(running)
            rank, code = next(iter(failed.items()))
            if code == -signal.SIGKILL:
                sys.stderr.write(
                    f"ftlevel: the process of rank {rank} was killed, as by a system without "
                    "memory; the others are stopped. --resume goes on from the newest whole "
                    "checkpoint.\n"
                )
                return _FAILED
            first = running[0].returncode
            return _exit_code(first if first and first > 0 else code)
        time.sleep(_POLL_SECONDS)
    codes = [process.returncode for process in running if process.returncode]
    return _exit_code(codes[0]) if codes else 0


def _exit_code(code: int) -> int:
    """Return the exit code of a process as shells have it, 143 after SIGTERM."""
    return code if code >= 0 else 128 - code


def end_with_parent() -> None:
    """Ask Linux to end this process by SIGTERM when what has started it is gone (prctl(2))."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Give the others a moment to see for themselves, then end them."""
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in running:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()  # it waits for the one that is gone
            process.wait()
