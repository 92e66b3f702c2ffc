"""What libraries raise when they read or build what a stranger's file describes."""

from __future__ import annotations

import struct

FROM_READERS = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
    RecursionError, NotImplementedError, struct.error,
)  # fmt: skip
"""A shape that they do not expect becomes any of these. Where nothing but such a file is read, it
is the file's fault; a RuntimeError is left out, which is what a lack of memory is called."""
