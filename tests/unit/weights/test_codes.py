"""Tests of activation-aware code selection against exhaustive search and bitsandbytes."""

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


def create_matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def create_moment(columns: int, rows: int = 300) -> torch.Tensor:
    """Return the second moment of correlated inputs."""
    inputs = create_matrix(rows, 6, seed=1) @ create_matrix(
        6, columns, seed=2
    ) + 0.3 * create_matrix(rows, columns, 3)
    return inputs.T @ inputs / rows


def compute_error(
    weight: torch.Tensor, quantized: torch.Tensor, moment: torch.Tensor
) -> torch.Tensor:
    """Return the mean squared error of each output row."""
    difference = (weight - quantized).double()
    return torch.einsum("ri,ij,rj->r", difference, moment.double(), difference)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_dequantizes_packed_codes(kind, double):
    grid, weight = four_bit_grid(kind, double), create_matrix(96, 128)
    codes = torch.randint(0, len(grid.values), weight.shape)
    scales = grid.scales_of(weight)
    packed, state = pack_4bit(codes, scales, weight, kind, double)
    actual = bnb.dequantize_4bit(packed, state)
    torch.testing.assert_close(actual, grid.value(codes, grid.stored(scales)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nearest_codes_match_bitsandbytes(kind):
    grid, weight = four_bit_grid(kind, True), create_matrix(64, 64)
    scales = grid.scales_of(weight)
    packed = pack_4bit(grid.nearest(weight, scales), scales, weight, kind, True)
    reference = quantize_4bit(weight, kind, True)
    values = [bnb.dequantize_4bit(*pair) for pair in (packed, reference)]
    assert torch.equal(values[0], values[1])  # fp4 has two codes for zero


def test_int8_scales_and_codes_match_bitsandbytes():
    class Config:
        load_in_8bit = True

    grid, weight = bitsandbytes_grid(Config), create_matrix(8, 40)
    scales = grid.scales_of(weight)
    codes, expected_scales, _ = bnb.int8_vectorwise_quant(weight.half())
    actual = grid.nearest(weight.half().float(), scales)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-3, atol=0)
    assert ((actual - 127) - codes).abs().max() <= 1
    assert ((actual - 127) == codes).float().mean() > 0.98


@pytest.mark.parametrize("columns", [64, 160])  # one block of columns, and two and a half
def test_no_single_code_change_improves_after_sweeps(columns):
    grid, weight, moment = (
        four_bit_grid("nf4", False),
        create_matrix(3, columns),
        create_moment(columns),
    )
    grid = QuantizationGrid(grid.values, columns // 2, grid.stored)
    scales = grid.scales_of(weight)
    codes = nearest = grid.nearest(weight, scales)
    for _ in range(40):
        codes = improve_codes(weight, codes, scales, moment, grid)
    damping = DAMPING * moment.diagonal().mean() * torch.eye(columns)
    best = compute_error(weight, grid.value(codes, scales), moment + damping)
    for column in range(columns):
        for code in range(len(grid.values)):
            changed_codes = codes.clone()
            changed_codes[:, column] = code
            changed_error = compute_error(
                weight, grid.value(changed_codes, scales), moment + damping
            )
            assert (changed_error >= best * (1 - 1e-5)).all()
    assert (best < 0.5 * compute_error(weight, grid.value(nearest, scales), moment + damping)).all()


def test_each_sweep_reduces_error():
    grid, weight, moment = four_bit_grid("nf4", True), create_matrix(32, 256), create_moment(256)
    scales = grid.scales_of(weight)
    stored = grid.stored(scales)
    damping = DAMPING * moment.diagonal().mean() * torch.eye(256)
    codes, before = grid.nearest(weight, scales), None
    for _ in range(4):
        current = compute_error(weight, grid.value(codes, stored), moment + damping)
        assert before is None or (current <= before * (1 + 1e-5)).all()
        before, codes = current, improve_codes(weight, codes, stored, moment, grid)


def test_uncorrelated_inputs_keep_nearest_codes():
    grid, weight = four_bit_grid("nf4", False), create_matrix(16, 128)
    scales = grid.scales_of(weight)
    nearest = grid.nearest(weight, scales)
    improved = improve_codes(weight, nearest, scales, torch.eye(128), grid)
    assert torch.equal(improved, nearest)


def test_weight_on_grid_keeps_codes():
    grid = four_bit_grid("nf4", True)
    scales = grid.scales_of(create_matrix(16, 128))
    codes = torch.randint(0, 16, (16, 128), generator=torch.Generator().manual_seed(4))
    weight = grid.value(codes, grid.stored(scales))
    improved = improve_codes(weight, codes, grid.stored(scales), create_moment(128), grid)
    assert torch.equal(improved, codes)


def test_select_codes_preserves_rank_4_change():
    """Sweeps alone trade the change for less noise; these inputs are nearly uncorrelated."""
    grid, moment = four_bit_grid("nf4", False), 0.1 * create_moment(256) + torch.eye(256)
    origin = create_matrix(192, 256)
    scales = grid.scales_of(origin)
    base = grid.value(grid.nearest(origin, scales), scales)
    change = 0.03 * create_matrix(192, 4, 5) @ create_matrix(4, 256, 6)
    start = grid.nearest(origin + change, scales)
    directions = torch.linalg.svd(change).U[:, :4].T  # output directions of the rank-4 change

    def get_relative_error(codes: torch.Tensor) -> float:
        residual, projected = (
            directions @ (base + change - grid.value(codes, scales)),
            directions @ change,
        )
        errors = [
            float(compute_error(value, 0 * value, moment).sum()) for value in (residual, projected)
        ]
        return errors[0] / errors[1]

    swept = start
    for _ in range(3):
        swept = improve_codes(base + change, swept, scales, moment, grid)
    selected = select_codes(base + change, change, start, scales, moment, grid)
    assert get_relative_error(selected) < 0.5 * get_relative_error(swept)
    assert get_relative_error(selected) < 0.8 * get_relative_error(start)
    noise = [
        float(compute_error(base + change, grid.value(codes, scales), moment).sum())
        for codes in (selected, start)
    ]
    assert noise[0] < 0.5 * noise[1]


def test_directions_span_the_change():
    change, moment = create_matrix(60, 3) @ create_matrix(3, 40, 1), create_moment(40)
    directions = compute_directions(change, moment)
    projected = directions @ (directions.T @ change)
    torch.testing.assert_close(projected, change, rtol=1e-3, atol=1e-3)
    assert compute_directions(0 * change, moment).abs().sum() == 0


def test_shrinkage_generalizes_to_other_inputs():
    """The moment of 100 rows is noisy off the diagonal; without shrinkage codes overfit."""
    torch.manual_seed(0)
    grid, weight = four_bit_grid("nf4", False), create_matrix(64, 256)
    shared = torch.randn(32, 256) / 4  # shared directions of the inputs
    few_inputs, many_inputs = (
        torch.randn(n, 32) @ shared + torch.randn(n, 256) for n in (100, 4000)
    )
    few_moment, many_moment = (
        inputs.T @ inputs / len(inputs) for inputs in (few_inputs, many_inputs)
    )
    scales = grid.scales_of(weight)
    stored, nearest = grid.stored(scales), grid.nearest(weight, scales)
    unshrunk = improve_codes(weight, nearest, stored, few_moment, grid)
    shrunk_codes = improve_codes(weight, nearest, stored, shrunk(few_moment), grid)
    errors = [
        compute_error(weight, grid.value(codes, stored), many_moment).sum()
        for codes in (unshrunk, shrunk_codes)
    ]
    assert errors[1] < 0.9 * errors[0]
    assert errors[1] < compute_error(weight, grid.value(nearest, stored), many_moment).sum()
