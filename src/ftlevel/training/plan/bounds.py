"""How long a row may be: what the model, its method and the machine's memory leave to the text."""

from __future__ import annotations

from typing import Any

from ftlevel.config import TrainConfig
from ftlevel.data.encoding.fit import Bounds
from ftlevel.errors import ConfigError
from ftlevel.methods import METHODS
from ftlevel.models.hardware import DTYPES
from ftlevel.models.kinds import max_positions
from ftlevel.models.memory import Holding, device_memory, longest_in_memory

_STORED = {"4bit": 0.5, "8bit": 1.0}


def find_bounds(config: TrainConfig, model_config: Any, device: str, dtype: str) -> Bounds:
    """Return the bounds of a row's length in tokens.

    Args:
        config: the whole configuration.
        model_config: the model's.
        device: torch device type.
        dtype: compute precision's name.

    Raises:
        ConfigError: the method's virtual tokens leave no room for text.
    """
    value = DTYPES[dtype].itemsize
    trained = METHODS[config.method.kind].trains_base(config.method)
    holding = Holding(
        weight=4.0 if trained else _STORED.get(config.quant.kind, float(value)),
        value=value,
        trained=trained,
        checkpointing=config.train.may_recompute(device),
    )
    memory = longest_in_memory(model_config, holding, device_memory(device))
    return Bounds(text_positions(config, model_config), memory)


def text_positions(config: TrainConfig, model_config: Any) -> int | None:
    """Return the longest sequence in tokens that the model leaves to the text.

    Raises:
        ConfigError: the method's virtual tokens leave no room for it.
    """
    positions = max_positions(model_config)
    method = METHODS[config.method.kind]
    if positions is None or method.positions is None:
        return positions
    taken = method.positions(config.method)
    if taken >= positions:
        raise ConfigError(
            f"--method {config.method.kind} with num_virtual_tokens {taken:,} leaves no room for "
            f"text in the {positions:,} positions of {model_config.model_type}. Use fewer."
        )
    return positions - taken
