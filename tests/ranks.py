"""Processes of a distributed run without a launcher, forked from one that has all imports."""

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
    work: Callable[..., Any], arguments: Sequence[Sequence[Any]], says: Path | None = None
) -> list[Forked]:
    """Start a process for each of `arguments`, as torchrun would with a node each.

    Args:
        work: of the module level, called with its process's arguments; an error of ftlevel ends
            the process as the command line would.
        arguments: of each process.
        says: file that gets the errors, in place of stderr.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        Forked(
            call=(_be, (work, own, says)),
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(len(arguments)),
                 "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
        )
        for rank, own in enumerate(arguments)
    ]  # fmt: skip


def end(ranks: Sequence[Forked], seconds: float = 400) -> list[int | None]:
    """Return the exit codes of `ranks`, of which none is left running; None is of one that was."""
    until = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < until:
        time.sleep(0.02)
    codes = [rank.poll() for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def _be(work: Callable[..., Any], arguments: Sequence[Any], says: Path | None) -> None:
    import torch

    from ftlevel.errors import FtlevelError

    torch.set_num_threads(1)
    try:
        work(*arguments)
    except FtlevelError as error:
        if not error.is_reported:
            with says.open("a") if says else contextlib.nullcontext(sys.stderr) as file:
                file.write(f"ftlevel: {error}\n")
        raise SystemExit(error.exit_code) from None
