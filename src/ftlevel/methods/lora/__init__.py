"""LoRA and QLoRA: spec → `peft.LoraConfig`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ftlevel.config.methods import LoraSpec
from ftlevel.errors import ConfigError, listing
from ftlevel.methods.base import Base, Method, whole


def build(spec: LoraSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import EvaConfig, LoraConfig  # here: it imports bitsandbytes, which logs on import

    init = spec.init_lora_weights
    ours = init in ("default", "loftq")  # loftq's start is set afterwards
    return LoraConfig(
        task_type=base.task_type,
        r=spec.r,
        lora_alpha=whole(spec.lora_alpha),
        lora_dropout=spec.lora_dropout,
        target_modules=base.targets,
        target_parameters=base.parameters or None,
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern={name: whole(alpha) for name, alpha in spec.alpha_pattern.items()},
        init_lora_weights=True if ours else init,
        eva_config=EvaConfig() if init == "eva" else None,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        bias=spec.bias,
        modules_to_save=base.heads or None,
        fan_in_fan_out=base.fan_in_fan_out,
    )


def check(spec: LoraSpec, widths: Mapping[str, int]) -> None:
    """Check that every pattern names a linear that is adapted.

    Raises:
        ConfigError: a key of `rank_pattern` or `alpha_pattern` would be ignored.
    """
    names = listing(dict.fromkeys(name.rpartition(".")[2] for name in widths), 8)
    problems = [
        f"method.{field}: {pattern!r} matches none of the {len(widths):,} adapted modules "
        f"({names}) and would be ignored. Give the end of a module's name or a "
        "regular expression."
        for field in ("rank_pattern", "alpha_pattern")
        for pattern in getattr(spec, field)
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in widths)  # as PEFT does
    ]
    if problems:
        raise ConfigError(problems)


def count(spec: LoraSpec, sizes: Mapping[str, tuple[int, int]]) -> int | None:
    """Return r · (in + out) for every linear, None where a setting makes it another number."""
    if spec.rank_pattern or spec.use_dora or spec.bias != "none":
        return None
    return sum(spec.r * (fan_in + fan_out) for fan_in, fan_out in sizes.values())


METHOD = Method(build, check=check, count=count)
