"""Distances of a model from its teacher, where a run of real models would not show them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ftlevel.config.preference import DistillationConfig
from ftlevel.tasks.losses import divergence, log_outcomes, outcome_dtype, select_top_k

NAMES = ("forward-kl", "reverse-kl", "jsd")


def distance(name: str, top: int | str, teacher: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    settings = DistillationConfig(teacher="t", divergence=name, kd_top_k=top)
    dtype = outcome_dtype(settings, teacher.shape[-1])
    known, ids = select_top_k(teacher, settings, dtype)
    assert known.shape[-1] == dtype["known"].shape[0]
    return divergence(known, log_outcomes(own, ids, known.shape[-1]), settings)


@pytest.mark.parametrize("name", NAMES)
def test_a_few_tokens_tell_less_than_all_and_more_tokens_tell_more(name: str) -> None:
    torch.manual_seed(0)
    teacher, own = torch.randn(2, 6, 50) * 3
    distances = [distance(name, top, teacher, own) for top in (1, 5, 20, 40, "all")]
    for less, more in pairwise(distances):
        assert (less <= more + 1e-6).all()
    assert distances[-1] == pytest.approx(distance(name, 49, teacher, own))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("top", [3, "all"])
def test_a_model_that_is_its_teacher_has_nothing_to_learn(name: str, top: int | str) -> None:
    torch.manual_seed(0)
    teacher = torch.randn(4, 30)
    own = (teacher + 7).requires_grad_()  # the same probabilities
    found = distance(name, top, teacher, own)
    found.sum().backward()
    assert found.abs().max() < 1e-6
    assert own.grad is not None
    assert own.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("top", [1, "all"])
def test_a_teacher_without_a_doubt_gives_finite_numbers(name: str, top: int | str) -> None:
    teacher = torch.full((2, 20), -300.0)
    teacher[:, 4] = 300.0
    own = torch.randn(2, 20).requires_grad_()
    distance(name, top, teacher, own).sum().backward()
    assert own.grad is not None
    assert torch.isfinite(own.grad).all()


def test_what_only_one_of_two_vocabularies_has_is_left_out() -> None:
    torch.manual_seed(0)
    teacher, own = torch.randn(3, 20), torch.randn(3, 24)
    found = distance("forward-kl", "all", teacher, own)
    assert found == pytest.approx(distance("forward-kl", "all", teacher, own[:, :20]))
