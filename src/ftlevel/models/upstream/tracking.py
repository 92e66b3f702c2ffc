"""A door for trackers: where TensorBoard's files go; else an environment variable says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tensorboard_into(directory: Path) -> Any:
    """Return the callback that writes what is logged for TensorBoard into `directory`."""
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    callback.logging_dir = str(directory)
    return callback
