"""Fine-tune transformers efficiently: one grammar for every family, task and PEFT method.

    from ftlevel import TrainConfig, train
    result = train(TrainConfig(task="summarization"))

Names are imported when they are first used, so that `import ftlevel` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftlevel.config import MergeConfig, TrainConfig
    from ftlevel.engine.generate import generate
    from ftlevel.engine.list_targets import list_targets
    from ftlevel.engine.merge import MergeResult, merge
    from ftlevel.engine.train import TrainResult, train
    from ftlevel.pipeline import FineTunePipeLine

__version__ = "0.1.0"

_PLACES = {
    "MergeConfig": "ftlevel.config",
    "MergeResult": "ftlevel.engine.merge",
    "TrainConfig": "ftlevel.config",
    "TrainResult": "ftlevel.engine.train",
    "train": "ftlevel.engine.train",
    "generate": "ftlevel.engine.generate",
    "list_targets": "ftlevel.engine.list_targets",
    "merge": "ftlevel.engine.merge",
    "FineTunePipeLine": "ftlevel.pipeline",
}

__all__ = [
    "FineTunePipeLine",
    "MergeConfig",
    "MergeResult",
    "TrainConfig",
    "TrainResult",
    "generate",
    "list_targets",
    "merge",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module 'ftlevel' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
