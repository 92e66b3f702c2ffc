"""What is dropped: as often as asked for, by the seed of the micro-batch, and made up for."""

from __future__ import annotations

import pytest
import torch

from ftlevel.fast.recompute import GeneratorDropout, dropout_mask, using_generator

SIZE = 1_000_000


@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_many_as_asked_for_are_dropped(p: float, dtype: torch.dtype) -> None:
    with using_generator(1):
        kept = dropout_mask(torch.empty(SIZE, dtype=dtype), p)
    share = (kept == 0).double().mean().item()
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / SIZE) ** 0.5)  # five deviations
    rest = kept[kept != 0]
    assert torch.equal(rest, rest[:1].expand_as(rest))
    assert rest[0].item() == pytest.approx(1 / (1 - p), rel=1e-2)
    assert kept.double().mean().item() == pytest.approx(
        1, abs=5e-3 + 5 * (p / (1 - p) / SIZE) ** 0.5
    )


def test_elements_are_drawn_apart() -> None:
    """Neither neighbours nor the four that share a draw say anything of one another."""
    with using_generator(2):
        kept = (dropout_mask(torch.empty(SIZE), 0.5) != 0).double() - 0.5
    for distance in (1, 2, 3, 4, 5, 384):
        together = (kept[distance:] * kept[:-distance]).mean().item() * 4
        assert abs(together) < 5 / SIZE**0.5


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4), (2, 3, 7)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    assert dropout_mask(torch.empty(shape), 0.5).shape == shape


def test_strided_input_is_dropped_where_it_is() -> None:
    states, dropout = torch.ones(64, 32).t(), GeneratorDropout(0.5).train()
    with using_generator(3):
        dropped = dropout(states)
    with using_generator(3):
        assert torch.equal(dropped, dropout_mask(states, 0.5))


def test_the_seed_decides() -> None:
    masks = []
    for seed in (1, 1, 2):
        with using_generator(seed):
            masks.append(dropout_mask(torch.empty(500), 0.5))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_torchs_own_generator_is_drawn_from_outside_of_a_worker() -> None:
    torch.manual_seed(5)
    first = dropout_mask(torch.empty(50), 0.5)
    second = dropout_mask(torch.empty(50), 0.5)
    torch.manual_seed(5)
    assert torch.equal(dropout_mask(torch.empty(50), 0.5), first)
    assert not torch.equal(first, second)
