"""Flash attention by a kernel of the Hugging Face hub that the user names: FA3, FA4 and others.

The package `kernels` fetches it, by name and version, where it is not there yet; nothing is fetched
that was not asked for. It has `flash_attn_varlen_func` of the flash-attention package, which aligns
a causal mask at the last query and the last key, as torch's does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from ftlevel.errors import InputError
from ftlevel.fast.attention.options import AttentionOptions
from ftlevel.fast.attention.varlen import WIDEST_HEAD, Lengths, window_of

FUNCTION = "flash_attn_varlen_func"


@dataclass(frozen=True)
class HubKernel:
    """A kernel that was fetched.

    Attributes:
        function: `flash_attn_varlen_func`.
        caps: whether it can be told at what scores are capped.
        windows: whether it can be told of a window.
        all_keys: what a side of its window is that has no end: None in FA4, else -1.
    """

    function: Callable[..., Any]
    caps: bool
    windows: bool
    all_keys: int | None

    @classmethod
    def read(cls, function: Callable[..., Any]) -> HubKernel:
        """Return what `function` takes, by its signature."""
        names = inspect.signature(function).parameters
        windows = "window_size" in names
        all_keys = names["window_size"].default[0] if windows else None
        return cls(function, "softcap" in names, windows, all_keys)

    def computes(self, options: AttentionOptions, head_dim: int) -> bool:
        """Whether it can be told of all `options`, for heads of `head_dim` elements."""
        can_be_told = (self.caps or options.cap is None) and (
            self.windows or options.window is None
        )
        return can_be_told and head_dim <= WIDEST_HEAD

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Lengths,
        options: AttentionOptions,
    ) -> torch.Tensor:  # fmt: skip
        """Return (tokens, heads, head_dim); arguments as of `attend_varlen`."""
        told: dict[str, Any] = {"softmax_scale": options.scale, "causal": options.causal}
        if options.cap is not None:
            told["softcap"] = options.cap
        if options.window is not None:
            left, right = window_of(options.causal, options.window)
            told["window_size"] = (left, self.all_keys if right < 0 else right)
        made = self.function(
            query, key, value, cu_seqlens_q=lengths.queries, cu_seqlens_k=lengths.keys,
            max_seqlen_q=lengths.most_queries, max_seqlen_k=lengths.most_keys, **told,
        )  # fmt: skip
        attended: torch.Tensor = made[0] if isinstance(made, tuple) else made
        return attended


@lru_cache(maxsize=4)
def fetch_kernel(named: str) -> HubKernel:
    """Return the kernel `named` OWNER/NAME@VERSION, a number or a revision.

    Raises:
        InputError: `kernels` is not installed, or has no such kernel for this machine.
    """
    if find_spec("kernels") is None:
        raise InputError(
            f"speed.attention_kernel {named} is fetched by the package kernels, which is not "
            "installed. pip install kernels, or drop it."
        )
    from kernels import get_kernel

    repository, _, version = named.partition("@")
    which: dict[str, Any] = {"version": int(version)} if version.isdigit() else {
        "revision": version
    }  # fmt: skip
    try:
        module = get_kernel(repository, **which)
    except Exception as error:
        raise InputError(
            f"The package kernels has no {named} for this machine: {error}. Name another in "
            "speed.attention_kernel, or drop it."
        ) from error
    function = getattr(module, FUNCTION, None)
    if function is None:
        raise InputError(
            f"{named} has no {FUNCTION}, so it cannot attend to rows of sequences. Name another in "
            "speed.attention_kernel (kernels-community/flash-attn3@1), or drop it."
        )
    return HubKernel.read(function)
