"""Processes of a distributed run without a launcher, forked from one that has all imports."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import peft  # noqa: F401
import transformers.trainer  # noqa: F401

import ftlevel.commands.train  # noqa: F401 - what the ranks would import, each for itself

PRELOADED = ["ranks"]


def start(
    work: Callable[..., Any], arguments: Sequence[Sequence[Any]], says: Path | None = None
) -> list[BaseProcess]:
    """Start a process for each of `arguments`, as torchrun would with a node each.

    Args:
        work: of the module level, called with its process's arguments; an error of ftlevel ends
            the process as the command line would.
        arguments: of each process.
        says: file that gets the errors, in place of stderr.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank, own in enumerate(arguments):
        world = {"RANK": str(rank), "WORLD_SIZE": str(len(arguments)), "LOCAL_RANK": "0",
                 "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}  # fmt: skip
        ranks.append(context.Process(target=_be, args=(world, work, own, says), daemon=True))
        ranks[-1].start()
    return ranks


def end(ranks: Sequence[BaseProcess], seconds: float = 400) -> list[int | None]:
    """Return the exit codes of `ranks`, of which none is left running."""
    for rank in ranks:
        rank.join(seconds)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def _be(
    world: Mapping[str, str], work: Callable[..., Any], arguments: Sequence[Any], says: Path | None
) -> None:
    import torch

    from ftlevel.errors import FtlevelError

    os.environ.update(world)
    torch.set_num_threads(1)
    try:
        work(*arguments)
    except FtlevelError as error:
        if not error.is_reported:
            with says.open("a") if says else contextlib.nullcontext(sys.stderr) as file:
                file.write(f"ftlevel: {error}\n")
        raise SystemExit(error.exit_code) from None
