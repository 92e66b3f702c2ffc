"""`ftlevel train`: build the configuration from recipe and flags, and train.

With --num-processes, it starts one process per rank and stops them together. Rendezvous uses
torchrun's environment variables. docs/reliability.md compares it with torchrun. `accelerate launch
--cpu` starts only one process.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import typer

from ftlevel.cli.flags import CommandInput, read_config
from ftlevel.cli.startup import heavy_imports, limit_malloc_arenas
from ftlevel.config import TrainConfig
from ftlevel.events import NullListener
from ftlevel.safe_io import python_command, start_process
from ftlevel.world import has_agent, is_follower, is_launched

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0
_PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # not all exist on Windows
_PR_SET_PDEATHSIG = 1
_FAILED = 1
_OVERWRITE_ALIAS = re.compile(r"--overwrite[-_]output[-_]dir\b")


def launch(args: Sequence[str], num_processes: int, restarts: int = 0) -> int:
    """Run `ftlevel args` in several processes; return the exit code of the first that failed.

    If one fails, the others are stopped; on Linux, they also end when this process dies. After
    exit code 1, the run is restarted with `--resume`, up to `restarts` times.
    """
    forwarded: list[int] = []
    while True:
        code = _launch_once(args, num_processes, forwarded)
        signals = set(forwarded) - {getattr(signal, "SIGUSR1", None)}  # does not end a run
        if code != _FAILED or signals or not restarts:
            return code
        restarts -= 1
        args = _resume_arguments(args)
        sys.stderr.write(f"ftlevel: restarting with --resume; {restarts:,} restarts are left.\n")


def _resume_arguments(args: Sequence[str]) -> list[str]:
    # --no-overwrite also overrides a recipe; another name of the flag would contradict it.
    renamed = [_OVERWRITE_ALIAS.sub("--overwrite", argument) for argument in args]
    return [*renamed, "--no-overwrite", "--resume"]


def _launch_once(args: Sequence[str], num_processes: int, forwarded: list[int]) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shared = {
        "OMP_NUM_THREADS": str(max(1, (cores or 1) // num_processes)),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
    }
    command = python_command("ftlevel", *args)
    running = [
        start_process(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
        for rank in range(num_processes)
    ]

    def forward(number: int, _frame: FrameType | None) -> None:
        forwarded.append(number)
        for process in running:
            process.send_signal(number)

    numbers = [n for n in (getattr(signal, name, None) for name in _PASSED_ON) if n is not None]
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        return _wait(running)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(running: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all processes and return 0; if one fails, stop the others and return its code."""
    while not (failed := [process for process in running if process.poll()]):
        if all(process.returncode == 0 for process in running):
            return 0
        time.sleep(_POLL_SECONDS)
    stopped = _stop(running)
    for rank, process in enumerate(running):
        if process.returncode == -signal.SIGKILL and process not in stopped:
            sys.stderr.write(
                f"ftlevel: the process of rank {rank} was killed, as happens when memory runs out; "
                "the others are stopped. --resume continues from the newest valid checkpoint.\n"
            )
            return _FAILED
    code = running[0].returncode
    code = code if code > 0 else failed[0].returncode
    return code if code >= 0 else 128 - code  # as shells do: 143 after SIGTERM


def end_with_parent() -> None:
    """Have Linux send SIGTERM to this process when the parent process dies (prctl(2))."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(running: Sequence[subprocess.Popen[bytes]]) -> list[subprocess.Popen[bytes]]:
    deadline = time.monotonic() + _GRACE_SECONDS
    killed = []
    for process in running:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()  # it may be waiting for a dead process
            process.wait()
            killed.append(process)
    return killed


def train(
    inputs: CommandInput,
    *,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    schema: bool,
    log_file: Path | None,
) -> None:
    """Fine-tune a model on a dataset.

    Without --model and --dataset, trains the built-in model on built-in examples. --set
    section.key=value sets any other field; --schema lists all fields.
    """
    if schema:
        typer.echo(json.dumps(TrainConfig.model_json_schema(), indent=2))
        return
    config, recipe = read_config(inputs)
    processes = config.train.num_processes or 1
    if processes > 1 and not dry_run and not is_launched():
        raise typer.Exit(launch(inputs.args, processes, config.train.max_restarts))
    if has_agent():
        end_with_parent()
    follows = is_follower()
    from ftlevel.cli.screen import open_screen

    log_file = None if follows else log_file
    with open_screen(as_json=as_json, quiet=quiet, log_file=log_file) as screen:
        limit_malloc_arenas()
        with heavy_imports():
            from ftlevel.commands.train import train as run
            from ftlevel.training.session import StartTime

        listener, start = NullListener() if follows else screen, StartTime.of_process()
        result = run(config, listener=listener, dry_run=dry_run, recipe=recipe, start=start)
    if as_json and not follows:
        typer.echo(json.dumps(result.summary, default=str))
