"""Fine-tune transformers efficiently: one grammar for every family, task and PEFT method.

    from ftlevel import TrainConfig, train
    result = train(TrainConfig(task="summarization"))

Public names are imported lazily, so `import ftlevel` is cheap. It does not register ftlevel's own
tuners with PEFT; `import ftlevel.adapters` does.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from ftlevel._version import __version__ as __version__

if TYPE_CHECKING:
    from ftlevel.commands.evaluate import Evaluation, evaluate
    from ftlevel.commands.generate import generate
    from ftlevel.commands.list_targets import list_targets
    from ftlevel.commands.merge import MergeResult, merge
    from ftlevel.commands.predict import Predictions, predict
    from ftlevel.commands.quantize import QuantizeResult, quantize
    from ftlevel.commands.train import TrainResult, train
    from ftlevel.config import (
        EvaluateConfig,
        MergeConfig,
        PredictConfig,
        QuantizeConfig,
        TrainConfig,
    )
    from ftlevel.pipeline import FineTunePipeLine

for _variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    # Shapes that oneDNN caches, read at the first matrix product. They rarely repeat in packed
    # batches: with the default of 1,024, 24 steps of MiniLM take 3.4 GiB, with 128 they take 1.9.
    os.environ.setdefault(_variable, "128")

_MODULES = {
    "ftlevel.config": "EvaluateConfig MergeConfig PredictConfig QuantizeConfig TrainConfig",
    "ftlevel.commands.evaluate": "Evaluation evaluate",
    "ftlevel.commands.generate": "generate",
    "ftlevel.commands.list_targets": "list_targets",
    "ftlevel.commands.merge": "MergeResult merge",
    "ftlevel.commands.predict": "Predictions predict",
    "ftlevel.commands.quantize": "QuantizeResult quantize",
    "ftlevel.commands.train": "TrainResult train",
    "ftlevel.pipeline": "FineTunePipeLine",
}
"""Module → public names that are imported from it."""

__all__ = [
    "EvaluateConfig",
    "Evaluation",
    "FineTunePipeLine",
    "MergeConfig",
    "MergeResult",
    "PredictConfig",
    "Predictions",
    "QuantizeConfig",
    "QuantizeResult",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "generate",
    "list_targets",
    "merge",
    "predict",
    "quantize",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first access."""
    if name == "adapters":
        return importlib.import_module("ftlevel.adapters")
    for module, names in _MODULES.items():
        if name in names.split():
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'ftlevel' has no attribute {name!r}")
