"""torchao's weight-only forms: one scale a row of a linear, int8 or float8 (e4m3) beside it.

torchao is an extra. Weights are packed by its own `quantize_`, a linear at a time, and flattened as
transformers' `save_pretrained` flattens them: several plain tensors, and a note in the file's
metadata of what they make.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from ftlevel.errors import ConfigError

INSTALL = "pip install 'ftlevel[torchao]'"
_CONFIGS = {"int8-torchao": "Int8WeightOnlyConfig", "float8-torchao": "Float8WeightOnlyConfig"}


def build_torchao_config(kind: str) -> Any:
    """Return transformers' `TorchAoConfig` for `kind`.

    Raises:
        ConfigError: torchao is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            f"--quant {kind} is torchao's, which is not installed. Install it: {INSTALL}"
        )
    import torchao.quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(quant_type=getattr(torchao.quantization, _CONFIGS[kind])())


def torchao_kind(stored: dict[str, Any]) -> str | None:
    """Return the kind of a checkpoint's `quantization_config`, None if it is none of these."""
    made_by = stored.get("quant_type")
    if stored.get("quant_method") != "torchao" or not isinstance(made_by, dict):
        return None
    name = made_by.get("default", {}).get("_type")
    return next((kind for kind, config in _CONFIGS.items() if config == name), None)


def is_torchao(quantization: Any) -> bool:
    """Whether `quantization` is a `TorchAoConfig`."""
    return type(quantization).__name__ == "TorchAoConfig"


PLAIN_NOTE = '{"_type": "Tensor"}'
"""What the metadata says of a tensor that is stored as it is."""


def torchao_bytes(shape: tuple[int, ...], quantization: Any) -> int:
    """Return the bytes of a weight `(out, in)`: a byte each, a scale a row, int8's zero points."""
    name = type(quantization.quant_type).__name__
    return math.prod(shape) + shape[0] * (5 if name == _CONFIGS["int8-torchao"] else 4)
