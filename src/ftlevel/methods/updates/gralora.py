"""GraLoRA: builds `peft.GraloraConfig` and converts adapters to plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftlevel.config.methods.updates.gralora import GraloraSpec
from ftlevel.methods.base import Base, Merging, Method, whole
from ftlevel.methods.facts import MERGES, MethodFacts
from ftlevel.methods.plain_form import AdapterFile, Factors, PlainForm
from ftlevel.methods.rates import Rates
from ftlevel.methods.updates.fit import check_divides
from ftlevel.methods.upstream import copy_base_outputs


def build(spec: GraloraSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import GraloraConfig

    return GraloraConfig(
        **base.shared,
        r=spec.r,
        alpha=whole(spec.alpha),
        gralora_k=spec.gralora_k,
        gralora_dropout=spec.gralora_dropout,
        fan_in_fan_out=base.fan_in_fan_out,
    )


def check(spec: GraloraSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Check that every linear layer can be split into the blocks."""
    check_divides("gralora_k", spec.gralora_k, sizes, outputs=True)


def as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Return the LoRAs of all blocks of each module as one product, of rank k · r.

    In PEFT's file A is `(k, in / k, r)`, where the j-th r / k columns belong to output block j;
    B is `(k, r, out / k)`.
    """
    import torch

    k, r = int(file.config["gralora_k"]), int(file.config["r"])
    scale = file.config["alpha"] / (r + file.config["hybrid_r"])
    diagonal: Any = torch.block_diag  # untyped
    found = {}
    for name in file.names("gralora_A"):
        down, up = file.take(name, "gralora_A", "gralora_B")
        blocks_in = [block.T.reshape(k, r // k, -1) for block in down]  # (output, r / k, in / k)
        a = torch.cat([diagonal(*(block[j] for block in blocks_in)) for j in range(k)])
        b = diagonal(*(block.T for block in up))
        if file.config["hybrid_r"]:
            more = file.take(name, "gralora_A_general.weight", "gralora_B_general.weight")
            a, b = torch.cat([a, more[0]]), torch.cat([b, more[1]], dim=1)
        found[name] = Factors(a, b * scale)
    file.said.append(f"GraLoRA's {k} × {k} blocks written as one product: rank k · r")
    return found


_METHOD = Method(
    (
        MethodFacts(
            "gralora",
            "gralora",
            "--method gralora",
            "LoRA on each of the blocks of every weight",
            MERGES,
            "Jung et al., 2025, arXiv:2505.20355",
            79_953_920,
        ),
    ),
    rate=Rates(narrow=1e-3, wide=2e-4, source="PEFT's method comparison"),
    build=build,
    check=check,
    prepare=copy_base_outputs,
    merging=Merging(("GRALORA",), plain_form=PlainForm(as_lora)),
)
METHODS = {"gralora": _METHOD}
