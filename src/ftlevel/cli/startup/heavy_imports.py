"""Set up the process of a command before torch is imported, and import it in peace.

torch, transformers and PEFT make half a million objects while they are imported, and nearly all of
them stay to the end of the process. Python's cycle collector goes through all of them again
whenever their number has grown by a quarter: a fifth of the time to the first training step.

On a CPU, oneDNN keeps the code that it has made for each shape of a product, 1,024 of them. Rows of
text have other lengths in every step, so what it keeps is of no use later: 0.4 MB a shape.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
from collections.abc import Iterator

from ftlevel.cli.startup.signals import ending_at_once

KEPT_SHAPES = 128
"""Shapes whose code is kept: those of a step. With 1,024 of them 12 steps of SmolLM2 hold 350 MB
more, in no less time (docs/performance.md)."""


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Keep the cycle collector from running in the block, and from what was made by its end.

    A signal ends a command at once in it.

    Where torch is imported already nothing is changed: in a program that uses ftlevel, or in a
    test, what lives may be anybody's, and garbage among it could never be freed.
    """
    if "torch" not in sys.modules:  # they are read once
        for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(name, str(KEPT_SHAPES))
    with ending_at_once():
        if "torch" in sys.modules or not gc.isenabled():
            yield
            return
        gc.disable()
        try:
            yield
            gc.freeze()
            atexit.register(_thaw)
        finally:
            gc.enable()


def _thaw() -> None:
    """Give the collector back what it was kept from, where the end of the process asks for it.

    Triton's binding (nanobind) prints thousands of its functions as leaked if they outlive their
    module; torch for CUDA brings Triton, and bitsandbytes imports it on a CPU, too.
    """
    if "triton" in sys.modules:
        gc.unfreeze()
