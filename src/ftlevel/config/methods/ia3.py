"""(IA)³."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec, TargetModules


class Ia3Spec(MethodSpec):
    """(IA)³: l_k · K, l_v · V and l_ff · γ(W₁x), l learned (Liu et al., 2022, section 3.3).

    A fused query-key-value layer is scaled as a whole; second feed-forward layers at their input.
    """

    kind: Literal["ia3"] = "ia3"
    target_modules: TargetModules | None = Field(
        None, description="Names of linear layers to scale; default: keys, values, feed-forward."
    )
