"""How transformers translates between a checkpoint and a model, asked for a tensor at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

in_reading_order = partial(sorted, key=dot_natural_key)
"""Names as transformers reads them: layer 2 before layer 10."""


class Naming:
    """How the names of a checkpoint become those of a model, as `from_pretrained` loads it.

    Args:
        model: its class, on the meta device.
        key_mapping: as `rename_prefix` gives it.

    Attributes:
        names: of the model's tensors, with them.
        converters: pattern → what converts the tensors that match it.
    """

    def __init__(self, model: Any, key_mapping: Mapping[str, str] | None = None) -> None:
        self._model, self._mapping = model, dict(key_mapping or {})
        self._conversions = get_model_conversion_mapping(model, self._mapping or None)
        self._converters = [c for c in self._conversions if isinstance(c, WeightConverter)]
        self._renamings = [c for c in self._conversions if isinstance(c, WeightRenaming)]
        self.converters = {p: c for c in self._converters for p in c.source_patterns}
        self.names = model.state_dict()

    def __call__(self, key: str) -> tuple[str, str | None]:
        """Return the model's name for `key`, and the pattern by which it is converted.

        The pattern is None where it is that tensor as it is; with one several tensors of the
        checkpoint may make one of the model, as with experts.
        """
        name, pattern = rename_source_key(
            key, self._renamings, self._converters, self._model.base_model_prefix, self.names
        )
        return (key, None) if name not in self.names and key in self.names else (name, pattern)

    def tell_model(self) -> None:
        """Tell the model which of the translations were used, as loading does (it is mutated)."""
        self._model._weight_conversions = [
            conversion
            for conversion in self._conversions
            if conversion.was_used() and set(self._mapping).isdisjoint(conversion.source_patterns)
        ]


def convert(
    converter: Any, name: str, parts: Iterable[tuple[str, str, torch.Tensor]], model: Any
) -> torch.Tensor:
    """Return the model's tensor `name`, of names, patterns and tensors in reading order."""
    converter = copy.deepcopy(converter)
    for key, pattern, tensor in parts:
        converter.add_tensor(name, key, pattern, tensor)
    value = converter.convert(name, model=model, config=model.config)[name]
    return value[0] if isinstance(value, list) else value


def forget_conversions(model: Any) -> None:
    """Let the tensors of `model` be saved under its own names (mutated)."""
    model._weight_conversions = []


def revert(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what `save_pretrained` writes for the model's `tensors`."""
    if not model._weight_conversions:
        return tensors
    saved: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return saved
