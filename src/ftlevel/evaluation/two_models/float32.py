"""Compute in float32 on narrow weights, so that what rounding does can be told apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ftlevel.models.upstream.tensors import own_tensors


@contextlib.contextmanager
def in_float32(model: torch.nn.Module) -> Iterator[None]:
    """Let `model` compute in float32 inside the block, on the weights that it has.

    Each module's weights are widened while it runs and no longer: a model in bfloat16 needs no more
    memory than one module's for it.
    """
    narrow: dict[torch.nn.Module, dict[str, Any]] = {}

    def widen(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        own, _ = own_tensors(module)
        narrow[module] = dict(own)
        for name, weight in narrow[module].items():
            if weight is not None and weight.is_floating_point():
                own[name] = torch.nn.Parameter(weight.float(), requires_grad=False)
        return tuple(_widened(value) for value in inputs)  # T5 narrows what its wo is given

    def restore(module: torch.nn.Module, _: Any, __: Any) -> None:
        own_tensors(module)[0].update(narrow.pop(module))

    hooks = []
    for module in model.modules():
        if own_tensors(module)[0]:
            hooks.append(module.register_forward_pre_hook(widen))
            hooks.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _widened(value: Any) -> Any:
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value
