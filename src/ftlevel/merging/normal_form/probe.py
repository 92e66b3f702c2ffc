"""The normal form of any linear method: its loaded layers are asked for what they do.

A layer gets zeros, the identity and a few random rows in float64, with the adapter; what the
untouched weight gives is subtracted. Where the random rows get what the identity promises, and
zeros get nothing, the layer is W plus a matrix, and the matrix is factored by its singular values.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from ftlevel.errors import InputError
from ftlevel.merging.normal_form.form import BaseWeights, NormalForm, assemble, is_whole, read_file
from ftlevel.methods.plain_form.factors import Factors

_ROWS = 8
_NOT_ALONE = (RuntimeError, AttributeError, TypeError, ValueError, LookupError)
"""What a layer raises that wants more than rows."""
_AT_ZERO, _LINEAR = 1e-9, 1e-5
_NOISE, _SMALLEST = 2e-7, 1e-6
"""Singular values below this share of the weight's norm, or of the largest one, are rounding."""


def form_by_probe(
    tuned: Any, directory: Any, config: Any, base: BaseWeights, limit: int
) -> NormalForm:
    """Return the normal form of the adapter that is on `tuned`, in eval mode and in float32.

    Raises:
        InputError: a layer does more than multiply by a matrix, or by one of a higher rank.
    """
    file = read_file(directory, config, base)
    file.tensors = {name: tensor for name, tensor in file.tensors.items() if is_whole(name, config)}
    factors = {
        name: _factor(change, name, limit, norm)
        for name, layer in _layers(tuned)
        for change, norm in [_change(layer, name, base)]
    }
    file.said.append("its layers asked for their update, which was factored")
    return assemble(factors, file, limit, "the probe")


def _layers(tuned: Any) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: list[tuple[str, Any]] = []
    for name, module in tuned.get_base_model().named_modules():
        inside = found and name.startswith(found[-1][0] + ".")
        if isinstance(module, BaseTunerLayer) and not inside:
            found.append((name, module))
    return found


def _change(layer: Any, name: str, base: BaseWeights) -> tuple[torch.Tensor, float]:
    """Return what the adapter adds to the weight, (out, in), and the weight's norm."""
    plain = layer.get_base_layer()
    if not isinstance(plain, torch.nn.Linear) and type(plain).__name__ != "Conv1D":
        raise InputError(f"{name} is no linear but a {type(plain).__name__}. Merge it")
    weight = base.checkpoint.read(f"{name}.weight").double()
    weight = weight if isinstance(plain, torch.nn.Linear) else weight.T
    held = getattr(plain, "bias", None) is not None
    bias = base.checkpoint.read(f"{name}.bias").double() if held else 0.0
    alone = copy.deepcopy(layer).double()
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(_ROWS, weight.shape[1], generator=generator, dtype=torch.float64)
    one_each = torch.eye(weight.shape[1], dtype=torch.float64)
    try:
        with torch.no_grad():
            zero, whole, given = (
                alone(rows) - (rows @ weight.T + bias) for rows in (some[:1] * 0, one_each, some)
            )
    except _NOT_ALONE as error:  # it has tensors that stay in float32, or wants whole sequences
        raise InputError(
            f"{name} cannot be asked by itself ({' '.join(str(error).split())[:80]}). Merge it"
        ) from None
    apart = (given - some @ whole).norm()
    if zero.abs().max() > _AT_ZERO or apart > _LINEAR * max(float(given.norm()), 1e-12):
        raise InputError(
            f"{name} changes its bias, or does more than multiply its input by a matrix, which no "
            "plain LoRA does"
        )
    return whole.T, float(weight.norm())


def _factor(change: torch.Tensor, name: str, limit: int, norm: float) -> Factors:
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    need = int((values > max(_NOISE * norm, float(values[0]) * _SMALLEST)).sum())
    if need > limit:
        raise InputError(
            f"the update of {name} has rank {need:,} of {min(change.shape):,}, above --max-rank "
            f"{limit}. Merge it"
        )
    need = max(need, 1)
    return Factors(right[:need].clone(), left[:, :need] * values[:need])
