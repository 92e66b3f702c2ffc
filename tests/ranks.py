"""Processes of a distributed run without a launcher, forked from one with all imports."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from forked import Forked


def start(
    work: Callable[..., Any], arguments: Sequence[Sequence[Any]], error_file: Path | None = None
) -> list[Forked]:
    """Start a process for each of `arguments`, like torchrun with one process per node.

    Args:
        work: module-level function, called with the arguments of the process; an error of ftlevel
            ends the process like the command line.
        arguments: of each process.
        says: file for errors instead of stderr.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        Forked(
            call=(_run_rank, (work, rank_arguments, error_file)),
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(len(arguments)),
                 "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
        )
        for rank, rank_arguments in enumerate(arguments)
    ]  # fmt: skip


def end(ranks: Sequence[Forked], seconds: float = 400) -> list[int | None]:
    """Wait for `ranks`, kill those that still run, and return exit codes (None if killed)."""
    deadline = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.02)
    codes = [rank.poll() for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def run(work: Callable[..., Any], *arguments: Any, count: int = 2) -> None:
    """Call `work(*arguments)` in `count` processes, which must succeed."""
    assert end(start(work, [arguments] * count)) == [0] * count


def _run_rank(work: Callable[..., Any], arguments: Sequence[Any], error_file: Path | None) -> None:
    import torch

    from ftlevel.errors import FtlevelError

    torch.set_num_threads(1)
    try:
        work(*arguments)
    except FtlevelError as error:
        if not error.is_reported:
            with error_file.open("a") if error_file else contextlib.nullcontext(sys.stderr) as file:
                file.write(f"ftlevel: {error}\n")
        raise SystemExit(error.exit_code) from None
