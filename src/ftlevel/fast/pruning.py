"""Last-layer token pruning: the last block computes only the tokens that are needed after it.

A language head needs positions that predict a target, a classifier one position per row. Other
tokens need only keys and values from the last block, so its other linear layers return zeros for
them. These layers are found by gradients: the gradient of a needed token with respect to the
layer's output at other tokens is exactly zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ftlevel.fast.packing import PackedLayout, current_layout


class LastLayerPruning:
    """Hooks that make `linears` compute only tokens in `PackedLayout.needed`, until `remove`."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        self._hooks = [
            linear.register_forward_pre_hook(_select_positions, prepend=True) for linear in linears
        ]
        self._hooks += [linear.register_forward_hook(_restore_positions) for linear in linears]

    def remove(self) -> None:
        """Remove the hooks from `linears`, which then compute all tokens."""
        for hook in self._hooks:
            hook.remove()


def _select_positions(
    linear: nn.Module,  # noqa: ARG001 - the signature of a hook
    args: tuple[Any, ...],
) -> tuple[Any, ...] | None:
    layout = current_layout()
    if layout is None or layout.needed is None or args[0].shape[-2] != layout.tokens:
        return None
    return (args[0].index_select(-2, layout.needed), *args[1:])


def _restore_positions(
    linear: nn.Module,  # noqa: ARG001 - the signature of a hook
    args: tuple[Any, ...],  # noqa: ARG001 - the signature of a hook
    output: Tensor,
) -> Tensor | None:
    layout = current_layout()
    if layout is None or layout.needed is None or output.shape[-2] != len(layout.needed):
        return None
    zeros = output.new_zeros(*output.shape[:-2], layout.tokens, output.shape[-1])
    return zeros.index_copy(-2, layout.needed, output)


def get_prunable_layers(
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    layout: PackedLayout,
    candidates: Sequence[nn.Module],
) -> list[nn.Module]:
    """Returns the candidates whose output at unneeded tokens does not affect needed tokens.

    Calls `block`, in eval mode, with `args` and `kwargs`; `layout` must be the current layout.
    """
    if layout.needed is None:
        raise ValueError("layout.needed is None: expected some of the tokens")
    outputs: dict[nn.Module, list[Any]] = {linear: [] for linear in candidates}

    def keep(linear: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        is_tensor = len(args) == 1 and isinstance(output, Tensor) and output.requires_grad
        outputs[linear].append(output if is_tensor else None)  # experts have more arguments

    with ExitStack() as hooks, torch.enable_grad():
        for linear in candidates:
            hooks.enter_context(linear.register_forward_hook(keep))
        args, kwargs = _with_gradient(args, kwargs)
        output = block(*args, **kwargs)
        states = output if isinstance(output, Tensor) else output[0]
        mask = torch.isin(torch.arange(layout.tokens, device=states.device), layout.needed)
        weights = torch.rand(states.shape, generator=torch.Generator().manual_seed(0))
        weights = weights.to(states) * mask[:, None]
        outputs_by_linear = {
            linear: results[0]
            for linear, results in outputs.items()
            if len(results) == 1 and results[0] is not None
        }
        gradients = torch.autograd.grad(
            (states * weights).sum(), list(outputs_by_linear.values()), allow_unused=True
        )
    return [
        linear
        for linear, gradient in zip(outputs_by_linear, gradients, strict=True)
        if gradient is not None and _has_only_needed(gradient, layout)
    ]


def _with_gradient(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    states = args[0] if args else kwargs["hidden_states"]
    states = states.detach().requires_grad_().clone()  # no leaf: blocks add to it in place
    return ((states, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": states})


def _has_only_needed(gradient: Tensor, layout: PackedLayout) -> bool:
    """Returns whether `gradient` (…, tokens, width) is nonzero, but only at needed tokens."""
    if layout.needed is None or gradient.dim() < 2 or gradient.shape[-2] != layout.tokens:
        return False
    per_token = gradient.abs().amax(-1).reshape(-1, layout.tokens).amax(0)
    mask = torch.zeros(layout.tokens, dtype=torch.bool, device=gradient.device)
    mask[layout.needed] = True
    return bool((per_token[~mask] == 0).all() and (per_token[mask] != 0).any())
