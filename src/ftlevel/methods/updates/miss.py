"""MiSS: builds `peft.MissConfig` and converts adapters to plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftlevel.config.methods.updates.miss import MissSpec
from ftlevel.errors import ConfigError, InputError
from ftlevel.methods.base import Base, Merging, Method
from ftlevel.methods.facts import MERGES, MethodFacts
from ftlevel.methods.plain_form import AdapterFile, Factors, PlainForm
from ftlevel.methods.rates import Rates
from ftlevel.methods.updates.fit import LINEARS_ONLY


def build(spec: MissSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import MissConfig

    return MissConfig(
        **base.shared,
        r=spec.r,
        miss_dropout=spec.miss_dropout,
    )


def check(spec: MissSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raise `ConfigError` if a linear layer has fewer inputs than r."""
    narrow = {name: fan_in for name, (fan_in, _) in sizes.items() if fan_in < spec.r}
    if narrow:
        name, width = min(narrow.items(), key=lambda item: item[1])
        raise ConfigError(
            f"method.r {spec.r} is more than the inputs of {len(narrow):,} of {len(sizes):,} "
            f"linears, such as {name} ({width:,} wide). Set method.r to {width} or less."
        )


def as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Return MiSS as LoRA, where A sums every r-th input; raises `InputError` for `bat`."""
    import torch

    start = file.config.get("init_weights")
    if start == "bat":
        raise InputError("its update depends on the base's weight (init_weights bat). Merge it")
    found = {}
    for name in file.names("miss_block"):
        (block,) = file.take(name, "miss_block")
        shape = file.read_base(f"{name}.weight").shape
        if start == "mini":
            block = block.repeat(1, shape[0] // block.shape[1])
        a = torch.zeros(len(block), shape[1], dtype=torch.float64)
        columns = torch.arange(shape[1])
        a[columns % len(block), columns] = 1
        found[name] = Factors(a, block.T.contiguous())
    file.said.append("MiSS's blocks written as sums over the input")
    return found


_METHOD = Method(
    (
        MethodFacts(
            "miss",
            "miss",
            "--method miss",
            "one matrix beside every linear, for summed inputs",
            MERGES,
            "Kang and Yin, 2024, arXiv:2409.15371",
            87_031_808,
        ),
    ),
    rate=Rates(
        narrow=3e-4, wide=1e-4, source="PEFT's method comparison", kinds={"encoder-decoder": 1e-3}
    ),
    build=build,
    rules=(LINEARS_ONLY,),
    check=check,
    merging=Merging(("MISS",), plain_form=PlainForm(as_lora)),
)
METHODS = {"miss": _METHOD}
