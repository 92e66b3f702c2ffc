"""LoHa and LoKr: builds `peft.LoHaConfig` and `peft.LoKrConfig`, and converts adapters to LoRA."""

from __future__ import annotations

from typing import Any

from ftlevel.config.methods.updates.lycoris import LohaSpec, LokrSpec
from ftlevel.methods.base import Base, Merging, Method, whole
from ftlevel.methods.facts import CONV1D, MERGES, MethodFacts, Rule, rows
from ftlevel.methods.plain_form import AdapterFile, Factors, PlainForm, by_pattern
from ftlevel.methods.rates import Rates


def build_loha(spec: LohaSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import LoHaConfig

    return LoHaConfig(
        **base.shared,
        r=spec.r,
        alpha=whole(spec.alpha),
        rank_dropout=spec.rank_dropout,
        module_dropout=spec.module_dropout,
    )


def build_lokr(spec: LokrSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import LoKrConfig

    return LoKrConfig(
        **base.shared,
        r=spec.r,
        alpha=whole(spec.alpha),
        decompose_factor=spec.decompose_factor,
        rank_dropout=spec.rank_dropout,
        module_dropout=spec.module_dropout,
    )


def loha_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Return s · (B₁A₁) ∘ (B₂A₂) of each module as one product of rank r²."""
    found = {}
    for name in file.names("hada_w1_a"):
        parts = file.take(name, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        b1, a1, b2, a2 = parts
        a = (a1.unsqueeze(1) * a2.unsqueeze(0)).reshape(-1, a1.shape[1])
        b = (b1.unsqueeze(2) * b2.unsqueeze(1)).reshape(len(b1), -1)
        found[name] = Factors(a, b * _scale(file, name, len(a1)))
    file.said.append("LoHa's product of two updates multiplied out: rank r²")
    return found


def lokr_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Return s · W₁ ⊗ W₂ of each module as Kronecker products of the factors."""
    import torch

    names = {key.rpartition(".lokr_")[0] for key in file.tensors if ".lokr_w" in key}
    found = {}
    for name in sorted(names):
        (b1, a1), (b2, a2) = (_sides(file, name, f"lokr_w{number}") for number in (1, 2))
        scale = _scale(
            file, name, by_pattern(file.config.get("rank_pattern"), name, file.config["r"])
        )
        found[name] = Factors(torch.kron(a1, a2), torch.kron(b1, b2) * scale)
    file.said.append("LoKr's Kronecker products multiplied out")
    return found


def _sides(file: AdapterFile, name: str, which: str) -> tuple[Any, Any]:
    """Return B and A of one Kronecker factor; for an undecomposed factor one is the identity."""
    import torch

    if f"{name}.{which}" not in file.tensors:
        b, a = file.take(name, f"{which}_a", f"{which}_b")
        return b, a
    (whole_side,) = file.take(name, which)
    rows, columns = whole_side.shape
    if rows <= columns:
        return torch.eye(rows, dtype=torch.float64), whole_side
    return whole_side, torch.eye(columns, dtype=torch.float64)


def _scale(file: AdapterFile, name: str, rank: int) -> float:
    return by_pattern(file.config.get("alpha_pattern"), name, file.config["alpha"]) / rank


_RULES = (
    Rule(
        rows("loha", "lokr"),
        "its linears are Conv1D, which PEFT does not take here",
        "Use --method lora.",
        families=CONV1D,
        quants=frozenset({"none"}),
    ),
    Rule(
        rows("loha", "lokr"),
        "PEFT multiplies the update with packed 4-bit weights",
        "Use --quant 8bit, or --method lora.",
        quants=frozenset({"4bit"}),
    ),
)
_LOHA = Method(
    (
        MethodFacts(
            "loha",
            "loha",
            "--method loha",
            "a product of two low-rank updates",
            MERGES,
            "Hyeon-Woo et al., 2022, arXiv:2108.06098",
            39_976_960,
        ),
    ),
    rate=Rates(narrow=1e-2, wide=1e-3, source="not measured"),
    build=build_loha,
    rules=_RULES,
    merging=Merging(("LOHA",), plain_form=PlainForm(loha_as_lora)),
)
_LOKR = Method(
    (
        MethodFacts(
            "lokr",
            "lokr",
            "--method lokr",
            "a Kronecker product as update",
            MERGES,
            "Yeh et al., 2024, arXiv:2309.14859",
            1_331_200,
        ),
    ),
    rate=Rates(narrow=1e-2, wide=1e-3, source="not measured"),
    build=build_lokr,
    rules=_RULES,
    merging=Merging(("LOKR",), plain_form=PlainForm(lokr_as_lora)),
)
METHODS = {"loha": _LOHA, "lokr": _LOKR}
