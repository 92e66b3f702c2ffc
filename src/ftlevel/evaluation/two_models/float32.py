"""Compute in float32 on narrow weights, so that what rounding does can be told apart."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ftlevel.models.upstream.tensors import own_tensors

_TOKENS = "trainable_tokens_delta"  # what PEFT's layer of trained tokens holds


@contextlib.contextmanager
def in_float32(
    model: torch.nn.Module, unrounded: Callable[[str], torch.Tensor | None] = lambda _: None
) -> Iterator[None]:
    """Let `model` compute in float32 inside the block, on the weights that it has.

    Each module's weights are widened while it runs and no longer: a model in bfloat16 needs no more
    memory than one module's for it.

    Args:
        model: in any precision.
        unrounded: name of a parameter → what to compute with in its stead, None for itself.
    """
    narrow: dict[torch.nn.Module, list[dict[str, Any]]] = defaultdict(list)
    paths = {module: path for path, module in model.named_modules()}

    def widen(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        for part in _read_by(module):
            own, _ = own_tensors(part)
            narrow[part].append(dict(own))
            for name, weight in narrow[part][-1].items():
                if weight is not None and weight.is_floating_point():
                    better = unrounded(f"{paths[part]}.{name}".lstrip("."))
                    wide = (weight if better is None else better).to(weight.device, torch.float32)
                    own[name] = torch.nn.Parameter(wide, requires_grad=False)
        return tuple(_widened(value) for value in inputs)  # T5 narrows what its wo is given

    def restore(module: torch.nn.Module, _: Any, __: Any) -> None:
        for part in _read_by(module):
            own_tensors(part)[0].update(narrow[part].pop())

    hooks = []
    for module in model.modules():
        if any(own_tensors(part)[0] for part in _read_by(module)):
            hooks.append(module.register_forward_pre_hook(widen))
            hooks.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _read_by(module: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
    """Return the modules whose weights `module` computes with, itself among them.

    PEFT's layer of trained tokens reads the weight of the layer that it is around, and does not
    call it.
    """
    if isinstance(module, BaseTunerLayer) and _TOKENS in module.adapter_layer_names:
        return module, module.get_base_layer()
    return (module,)


def _widened(value: Any) -> Any:
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value
