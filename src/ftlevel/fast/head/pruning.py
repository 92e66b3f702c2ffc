"""The last block at the tokens that are read, and nowhere else.

After the last block a language head reads the positions that predict a target, and a classifier one
position of each row. For the other tokens the last block has only to give keys and values: its
other linears compute the tokens that are read, and give zeros for the rest, which nothing reads.

Which linears those are is asked of the block: the gradient of what is read, with respect to what a
linear gives for a token that is not, is exactly zero where no path leads from the one to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ftlevel.fast.packing.layout import Layout, current_layout


class UnreadTokens:
    """Hooks that have linears compute only the tokens that `Layout.read` names.

    Args:
        linears: of the last block, as `find_token_wise` gives them (mutated until `remove`).
    """

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        self._hooks = [linear.register_forward_pre_hook(_take, prepend=True) for linear in linears]
        self._hooks += [linear.register_forward_hook(_give_back) for linear in linears]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def _take(
    linear: nn.Module,  # noqa: ARG001 - the signature of a hook
    args: tuple[Any, ...],
) -> tuple[Any, ...] | None:
    """Return the arguments with the input (…, tokens, in) at the tokens that are read."""
    layout = current_layout()
    if layout is None or layout.read is None or args[0].shape[-2] != layout.tokens:
        return None
    return (args[0].index_select(-2, layout.read), *args[1:])


def _give_back(
    linear: nn.Module,  # noqa: ARG001 - the signature of a hook
    args: tuple[Any, ...],  # noqa: ARG001 - the signature of a hook
    output: torch.Tensor,
) -> torch.Tensor | None:
    """Return the output (…, tokens, out), zero for the tokens that are not read."""
    layout = current_layout()
    if layout is None or layout.read is None or output.shape[-2] != len(layout.read):
        return None
    zeros = output.new_zeros(*output.shape[:-2], layout.tokens, output.shape[-1])
    return zeros.index_copy(-2, layout.read, output)


def find_token_wise(
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    layout: Layout,
    candidates: Sequence[nn.Module],
) -> list[nn.Module]:
    """Return the candidates whose output at tokens that are not read reaches none that is.

    Args:
        block: in evaluation; gives states (batch, seq, hidden), alone or first in a tuple.
        args: what it is called with, on `layout`, which must be the current one.
        kwargs: as `args`.
        layout: has some tokens that are read, and some that are not.
        candidates: linears of the block.
    """
    if layout.read is None:
        raise ValueError("layout.read is None: expected some of the tokens")
    outputs: dict[nn.Module, list[Any]] = {linear: [] for linear in candidates}

    def keep(linear: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        is_plain = len(args) == 1 and isinstance(output, torch.Tensor) and output.requires_grad
        outputs[linear].append(output if is_plain else None)  # experts take more than the states

    hooks = [linear.register_forward_hook(keep) for linear in candidates]
    try:
        with torch.enable_grad():
            args, kwargs = _with_gradient(args, kwargs)
            made = block(*args, **kwargs)
            states = made if isinstance(made, torch.Tensor) else made[0]
            read = torch.isin(layout.restore, layout.read)  # padding points at tokens too
            weights = torch.rand(states.shape, generator=torch.Generator().manual_seed(0))
            weights = weights.to(states) * read.view(*states.shape[:2], 1)
            once = {
                linear: made[0]
                for linear, made in outputs.items()
                if len(made) == 1 and made[0] is not None
            }
            gradients = torch.autograd.grad(
                (states * weights).sum(), list(once.values()), allow_unused=True
            )
    finally:
        for hook in hooks:
            hook.remove()
    return [
        linear
        for linear, gradient in zip(once, gradients, strict=True)
        if gradient is not None and _is_of_read(gradient, layout)
    ]


def _with_gradient(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with states that ask for a gradient, so that everything does."""
    states = args[0] if args else kwargs["hidden_states"]
    states = states.detach().requires_grad_().clone()  # no leaf: blocks add to it in place
    return ((states, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": states})


def _is_of_read(gradient: torch.Tensor, layout: Layout) -> bool:
    """Whether the gradient (…, tokens, width) of an output is there for tokens read alone."""
    if layout.read is None or gradient.dim() < 2 or gradient.shape[-2] != layout.tokens:
        return False
    per_token = gradient.abs().amax(-1).reshape(-1, layout.tokens).amax(0)
    is_read = torch.zeros(layout.tokens, dtype=torch.bool, device=gradient.device)
    is_read[layout.read] = True
    return bool((per_token[~is_read] == 0).all() and (per_token[is_read] != 0).any())
