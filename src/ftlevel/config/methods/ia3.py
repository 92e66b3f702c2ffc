"""(IA)³."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec, TargetModules


class Ia3Spec(MethodSpec):
    """(IA)³: one learned factor for each key, value and inner feed-forward feature.

    Liu et al. (2022, section 3.3): l_k · K, l_v · V and l_ff · γ(W₁x). The default finds these
    linears by their names; where query, key and value are one linear, all of it is scaled. Of the
    names that the user gives, the second linears of feed-forward layers have their input scaled.
    """

    kind: Literal["ia3"] = "ia3"
    target_modules: TargetModules | None = Field(
        None, description="Linears to scale, by name; the default finds keys, values and the rest."
    )
