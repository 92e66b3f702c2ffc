"""Fine-tune transformers efficiently: one grammar for every family, task and PEFT method.

    from ftlevel import TrainConfig, train
    result = train(TrainConfig(task="summarization"))

Public names are imported lazily, so `import ftlevel` is cheap. It does not register ftlevel's own
tuners with PEFT; `import ftlevel.adapters` does.
"""

from __future__ import annotations

import importlib
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

_PLACES = {
    "MergeConfig": "ftlevel.config",
    "MergeResult": "ftlevel.commands.merge",
    "EvaluateConfig": "ftlevel.config",
    "Evaluation": "ftlevel.commands.evaluate",
    "PredictConfig": "ftlevel.config",
    "Predictions": "ftlevel.commands.predict",
    "QuantizeConfig": "ftlevel.config",
    "QuantizeResult": "ftlevel.commands.quantize",
    "TrainConfig": "ftlevel.config",
    "TrainResult": "ftlevel.commands.train",
    "train": "ftlevel.commands.train",
    "quantize": "ftlevel.commands.quantize",
    "evaluate": "ftlevel.commands.evaluate",
    "generate": "ftlevel.commands.generate",
    "list_targets": "ftlevel.commands.list_targets",
    "merge": "ftlevel.commands.merge",
    "predict": "ftlevel.commands.predict",
    "FineTunePipeLine": "ftlevel.pipeline",
}

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
    if name not in _PLACES:
        raise AttributeError(f"module 'ftlevel' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
