"""Tests of dropout masks: rate, scaling, seed and independence."""

from __future__ import annotations

import pytest
import torch

from ftlevel.fast.recompute import GeneratorDropout, dropout_mask, using_generator

SIZE = 1_000_000


@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropout_rate_and_scaling(p, dtype):
    with using_generator(1):
        mask = dropout_mask(torch.empty(SIZE, dtype=dtype), p)
    dropped_share = (mask == 0).double().mean().item()
    assert dropped_share == pytest.approx(
        p, abs=5 * (p * (1 - p) / SIZE) ** 0.5
    )  # five standard deviations
    nonzero = mask[mask != 0]
    assert torch.equal(nonzero, nonzero[:1].expand_as(nonzero))
    assert nonzero[0].item() == pytest.approx(1 / (1 - p), rel=1e-2)
    assert mask.double().mean().item() == pytest.approx(
        1, abs=5e-3 + 5 * (p / (1 - p) / SIZE) ** 0.5
    )


def test_mask_elements_are_independent():
    """Neighbors, and the four elements that share a random number, are uncorrelated."""
    with using_generator(2):
        mask = (dropout_mask(torch.empty(SIZE), 0.5) != 0).double() - 0.5
    for distance in (1, 2, 3, 4, 5, 384):
        correlation = (mask[distance:] * mask[:-distance]).mean().item() * 4
        assert abs(correlation) < 5 / SIZE**0.5


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4), (2, 3, 7)])
def test_mask_has_input_shape(shape):
    assert dropout_mask(torch.empty(shape), 0.5).shape == shape


def test_dropout_of_strided_input_matches_mask():
    states, dropout = torch.ones(64, 32).t(), GeneratorDropout(0.5).train()
    with using_generator(3):
        dropped = dropout(states)
    with using_generator(3):
        assert torch.equal(dropped, dropout_mask(states, 0.5))


def test_mask_depends_on_seed():
    masks = []
    for seed in (1, 1, 2):
        with using_generator(seed):
            masks.append(dropout_mask(torch.empty(500), 0.5))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_torch_generator_is_used_outside_workers():
    torch.manual_seed(5)
    first = dropout_mask(torch.empty(50), 0.5)
    second = dropout_mask(torch.empty(50), 0.5)
    torch.manual_seed(5)
    assert torch.equal(dropout_mask(torch.empty(50), 0.5), first)
    assert not torch.equal(first, second)
