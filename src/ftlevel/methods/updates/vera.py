"""VeRA: builds `peft.VeraConfig` and converts adapters to plain LoRA."""

from __future__ import annotations

from typing import Any

from ftlevel.config.methods.updates.vera import VeraSpec
from ftlevel.errors import InputError
from ftlevel.methods.base import Base, Merging, Method
from ftlevel.methods.facts import MERGES, MethodFacts
from ftlevel.methods.plain_form import AdapterFile, Factors, PlainForm
from ftlevel.methods.rates import Rates


def build(spec: VeraSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import VeraConfig

    return VeraConfig(
        **base.shared,
        r=spec.r,
        d_initial=spec.d_initial,
        vera_dropout=spec.vera_dropout,
        projection_prng_key=spec.projection_prng_key,
        save_projection=True,
        fan_in_fan_out=base.fan_in_fan_out,
    )


def as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Return diag(b) · B · diag(d) · A per module; raises `InputError` without shared A and B."""
    if not {"base_model.vera_A", "base_model.vera_B"} <= set(file.tensors):
        raise InputError(
            "its shared matrices are not in its file (save_projection was off). Load it with PEFT "
            "and save it with save_projection=True"
        )
    shared_a, shared_b = (file.tensors.pop(f"base_model.vera_{x}").double() for x in "AB")
    found = {}
    for name in file.names("vera_lambda_b"):
        d, b = file.take(name, "vera_lambda_d", "vera_lambda_b")
        base = file.read_base(f"{name}.weight").shape
        width = base[1] if base[0] == len(b) else base[0]  # Conv1D weights are (in, out)
        a = d.unsqueeze(-1) * shared_a[:, :width]
        found[name] = Factors(a, b.unsqueeze(-1) * shared_b[: len(b)])
    file.said.append("VeRA's vectors multiplied into its shared matrices")
    return found


_METHOD = Method(
    (
        MethodFacts(
            "vera",
            "vera",
            "--method vera",
            "two vectors beside every linear",
            MERGES,
            "Kopiczko et al., 2024, arXiv:2310.11454",
            1_417_216,
        ),
    ),
    rate=Rates(
        narrow=5e-2,
        wide=4e-3,
        source="within the paper's range on GLUE",
        tokens=1e-1,
        kinds={"decoder": 6e-2, "encoder-decoder": 1e-1},
    ),
    build=build,
    merging=Merging(("VERA",), plain_form=PlainForm(as_lora)),
)
METHODS = {"vera": _METHOD}
