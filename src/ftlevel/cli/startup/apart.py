"""What a process of `compare` does first, as `main` does for a command of its own."""

from __future__ import annotations

import logging

from ftlevel.cli.startup.heap import share_heaps

NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that tell at import which GPU kernels this machine lacks, and what torch deprecates."""


def hush() -> None:
    """Keep libraries from telling at their import what nobody asked for."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def prepare() -> None:
    """Set up a process in which a run is trained."""
    hush()
    share_heaps()


hush()  # a server of processes imports this before the libraries
