"""transformers' conversion of checkpoint tensors to model tensors, one at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

in_reading_order = partial(sorted, key=dot_natural_key)
"""Sorts names as transformers does: layer 2 before layer 10."""


class Naming:
    """Mapping of checkpoint names to those of a meta model, as in `from_pretrained`."""

    def __init__(self, model: Any, key_mapping: Mapping[str, str] | None = None) -> None:
        self._model, self._mapping = model, dict(key_mapping or {})
        self._conversions = get_model_conversion_mapping(model, self._mapping or None)
        self._converters = [c for c in self._conversions if isinstance(c, WeightConverter)]
        self._renamings = [c for c in self._conversions if isinstance(c, WeightRenaming)]
        self.converters = {p: c for c in self._converters for p in c.source_patterns}
        self.names = model.state_dict()

    def __call__(self, key: str) -> tuple[str, str | None]:
        """Return the model's name for `key`, and its converter pattern, if any."""
        name, pattern = rename_source_key(
            key, self._renamings, self._converters, self._model.base_model_prefix, self.names
        )
        return (key, None) if name not in self.names and key in self.names else (name, pattern)

    def tell_model(self) -> None:
        """Store the conversions that were used in the model, as loading does (mutated)."""
        self._model._weight_conversions = [
            conversion
            for conversion in self._conversions
            if conversion.was_used() and set(self._mapping).isdisjoint(conversion.source_patterns)
        ]


def convert(
    converter: Any, name: str, parts: Iterable[tuple[str, str, Tensor]], model: Any
) -> Tensor:
    """Return the model tensor `name` from (name, pattern, tensor) parts in reading order."""
    converter = copy.deepcopy(converter)
    for key, pattern, tensor in parts:
        converter.add_tensor(name, key, pattern, tensor)
    value = converter.convert(name, model=model, config=model.config)[name]
    return value[0] if isinstance(value, list) else value


def forget_conversions(model: Any) -> None:
    """Make `save_pretrained` use the model's own names (mutated)."""
    model._weight_conversions = []


def revert(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that `save_pretrained` writes for the model's `tensors`."""
    if not model._weight_conversions:
        return tensors
    return revert_weight_conversion(model, tensors)
