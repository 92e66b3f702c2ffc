"""Import what a command needs without the collector going through it.

torch, transformers and PEFT make half a million objects while they are imported, and nearly all of
them stay to the end of the process. Python's cycle collector goes through all of them again
whenever their number has grown by a quarter: a fifth of the time to the first training step.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected_imports() -> Iterator[None]:
    """Keep the cycle collector from running in the block, and from what was made by its end.

    Where torch is imported already nothing is changed: in a program that uses ftlevel, or in a
    test, what lives may be anybody's, and garbage among it could never be freed.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
