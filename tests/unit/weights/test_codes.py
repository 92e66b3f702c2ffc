"""Codes that are chosen by what a layer gives, against exhaustive search and bitsandbytes."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from ftlevel.weights.codes import (
    DAMPING,
    QuantizationGrid,
    compute_directions,
    four_bit_grid,
    improve_codes,
    pack_4bit,
    quantize_4bit,
    select_codes,
    shrunk,
)
from ftlevel.weights.quantize_shards import bitsandbytes_grid


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def moment_of(columns: int, rows: int = 300) -> torch.Tensor:
    """Return the second moment of inputs that depend on each other, as those of a model do."""
    inputs = matrix(rows, 6, seed=1) @ matrix(6, columns, seed=2) + 0.3 * matrix(rows, columns, 3)
    return inputs.T @ inputs / rows


def error(weight: torch.Tensor, found: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Return the mean square error of each row's output."""
    apart = (weight - found).double()
    return torch.einsum("ri,ij,rj->r", apart, moment.double(), apart)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_reads_the_codes_that_were_chosen(kind: str, double: bool) -> None:
    grid, weight = four_bit_grid(kind, double), matrix(96, 128)
    codes = torch.randint(0, len(grid.values), weight.shape)
    scales = grid.scales_of(weight)
    packed, state = pack_4bit(codes, scales, weight, kind, double)
    found = bnb.dequantize_4bit(packed, state)
    torch.testing.assert_close(found, grid.value(codes, grid.stored(scales)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_nearest_codes_are_those_of_bitsandbytes(kind: str) -> None:
    grid, weight = four_bit_grid(kind, True), matrix(64, 64)
    scales = grid.scales_of(weight)
    own = pack_4bit(grid.nearest(weight, scales), scales, weight, kind, True)
    theirs = quantize_4bit(weight, kind, True)
    read = [bnb.dequantize_4bit(*one) for one in (own, theirs)]
    assert torch.equal(read[0], read[1])  # fp4 has two codes for zero


def test_eight_bits_are_rows_of_their_own_scale() -> None:
    class Config:
        load_in_8bit = True

    grid, weight = bitsandbytes_grid(Config), matrix(8, 40)
    scales = grid.scales_of(weight)
    codes, theirs, _ = bnb.int8_vectorwise_quant(weight.half())
    found = grid.nearest(weight.half().float(), scales)
    torch.testing.assert_close(scales, theirs, rtol=1e-3, atol=0)
    assert ((found - 127) - codes).abs().max() <= 1
    assert ((found - 127) == codes).float().mean() > 0.98


@pytest.mark.parametrize("columns", [64, 160])  # one run of columns, and two and a half
def test_no_single_code_could_be_better_after_sweeps(columns: int) -> None:
    grid, weight, moment = four_bit_grid("nf4", False), matrix(3, columns), moment_of(columns)
    grid = QuantizationGrid(grid.values, columns // 2, grid.stored)
    scales = grid.scales_of(weight)
    codes = nearest = grid.nearest(weight, scales)
    for _ in range(40):
        codes = improve_codes(weight, codes, scales, moment, grid)
    share = DAMPING * moment.diagonal().mean() * torch.eye(columns)
    least = error(weight, grid.value(codes, scales), moment + share)
    for column in range(columns):
        for code in range(len(grid.values)):
            other = codes.clone()
            other[:, column] = code
            changed = error(weight, grid.value(other, scales), moment + share)
            assert (changed >= least * (1 - 1e-5)).all()
    assert (least < 0.5 * error(weight, grid.value(nearest, scales), moment + share)).all()


def test_each_sweep_is_nearer() -> None:
    grid, weight, moment = four_bit_grid("nf4", True), matrix(32, 256), moment_of(256)
    scales = grid.scales_of(weight)
    stored = grid.stored(scales)
    share = DAMPING * moment.diagonal().mean() * torch.eye(256)
    codes, before = grid.nearest(weight, scales), None
    for _ in range(4):
        found = error(weight, grid.value(codes, stored), moment + share)
        assert before is None or (found <= before * (1 + 1e-5)).all()
        before, codes = found, improve_codes(weight, codes, stored, moment, grid)


def test_inputs_that_do_not_depend_on_each_other_leave_the_nearest() -> None:
    grid, weight = four_bit_grid("nf4", False), matrix(16, 128)
    scales = grid.scales_of(weight)
    nearest = grid.nearest(weight, scales)
    found = improve_codes(weight, nearest, scales, torch.eye(128), grid)
    assert torch.equal(found, nearest)


def test_a_weight_on_the_grid_stays() -> None:
    grid = four_bit_grid("nf4", True)
    scales = grid.scales_of(matrix(16, 128))
    codes = torch.randint(0, 16, (16, 128), generator=torch.Generator().manual_seed(4))
    weight = grid.value(codes, grid.stored(scales))
    found = improve_codes(weight, codes, grid.stored(scales), moment_of(128), grid)
    assert torch.equal(found, codes)


def test_the_change_arrives_in_the_directions_that_it_writes_to() -> None:
    """Sweeps alone trade it for less noise elsewhere: inputs here hardly depend on each other."""
    grid, moment = four_bit_grid("nf4", False), 0.1 * moment_of(256) + torch.eye(256)
    origin = matrix(192, 256)
    scales = grid.scales_of(origin)
    base = grid.value(grid.nearest(origin, scales), scales)
    change = 0.03 * matrix(192, 4, 5) @ matrix(4, 256, 6)
    start = grid.nearest(origin + change, scales)
    sides = torch.linalg.svd(change).U[:, :4].T  # what a change of rank 4 can write to

    def lost(codes: torch.Tensor) -> float:
        missing, whole = sides @ (base + change - grid.value(codes, scales)), sides @ change
        of = [float(error(one, 0 * one, moment).sum()) for one in (missing, whole)]
        return of[0] / of[1]

    alone = start
    for _ in range(3):
        alone = improve_codes(base + change, alone, scales, moment, grid)
    found = select_codes(base + change, change, start, scales, moment, grid)
    assert lost(found) < 0.5 * lost(alone)
    assert lost(found) < 0.8 * lost(start)
    noise = [
        float(error(base + change, grid.value(codes, scales), moment).sum())
        for codes in (found, start)
    ]
    assert noise[0] < 0.5 * noise[1]


def test_directions_are_the_first_of_what_a_change_does() -> None:
    change, moment = matrix(60, 3) @ matrix(3, 40, 1), moment_of(40)
    found = compute_directions(change, moment)
    kept = found @ (found.T @ change)
    torch.testing.assert_close(kept, change, rtol=1e-3, atol=1e-3)
    assert compute_directions(0 * change, moment).abs().sum() == 0


def test_codes_that_were_chosen_on_few_inputs_serve_others_of_their_kind() -> None:
    """H of 100 rows is known less well than its diagonal: held to it, codes fit those rows."""
    torch.manual_seed(0)
    grid, weight = four_bit_grid("nf4", False), matrix(64, 256)
    shared = torch.randn(32, 256) / 4  # what inputs have in common
    some, others = (torch.randn(n, 32) @ shared + torch.randn(n, 256) for n in (100, 4000))
    few, many = (inputs.T @ inputs / len(inputs) for inputs in (some, others))
    scales = grid.scales_of(weight)
    stored, nearest = grid.stored(scales), grid.nearest(weight, scales)
    held = improve_codes(weight, nearest, stored, few, grid)
    chosen = improve_codes(weight, nearest, stored, shrunk(few), grid)
    left = [error(weight, grid.value(codes, stored), many).sum() for codes in (held, chosen)]
    assert left[1] < 0.9 * left[0]
    assert left[1] < error(weight, grid.value(nearest, stored), many).sum()
