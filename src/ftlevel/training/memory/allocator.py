"""How torch hands out a GPU's memory in a run: in segments that grow.

Micro-batches of many lengths leave holes between segments of fixed size; torch's own answer is off
by default.
"""

from __future__ import annotations

import os

import torch
from packaging.version import Version

SETTING = "expandable_segments:True"
OLD_NAME, NAME = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"

_NEW_SINCE = Version("2.11")
"""torch 2.9.1 warns of the old name and reads nothing of this from the new one
(https://github.com/pytorch/pytorch/issues/183387)."""


def use_expandable_segments(device: str) -> None:
    """Set it for this process before the first tensor is on the GPU; what the user set stays.

    Args:
        device: torch device type.
    """
    if device != "cuda" or any(name in os.environ for name in (OLD_NAME, NAME)):
        return
    has_new = Version(torch.__version__) >= _NEW_SINCE
    os.environ[NAME if has_new else OLD_NAME] = SETTING
