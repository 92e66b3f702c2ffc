"""Tests of distillation divergences in edge cases."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ftlevel.config.sections import DistillationConfig
from ftlevel.tasks.losses import divergence, log_outcomes, outcome_dtype, select_top_k

DIVERGENCES = ("forward-kl", "reverse-kl", "jsd")


def compute_divergence(
    name: str, top_k: int | str, teacher: torch.Tensor, student: torch.Tensor
) -> torch.Tensor:
    settings = DistillationConfig(teacher="t", divergence=name, kd_top_k=top_k)
    dtype = outcome_dtype(settings, teacher.shape[-1])
    log_probs, ids = select_top_k(teacher, settings, dtype)
    assert log_probs.shape[-1] == dtype["known"].shape[0]
    return divergence(log_probs, log_outcomes(student, ids, log_probs.shape[-1]), settings)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_grows_with_top_k(name):
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 6, 50) * 3
    distances = [
        compute_divergence(name, top_k, teacher, student) for top_k in (1, 5, 20, 40, "all")
    ]
    for smaller, larger in pairwise(distances):
        assert (smaller <= larger + 1e-6).all()
    assert distances[-1] == pytest.approx(compute_divergence(name, 49, teacher, student))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("top_k", [3, "all"])
def test_divergence_and_gradient_are_zero_for_equal_models(name, top_k):
    torch.manual_seed(0)
    teacher = torch.randn(4, 30)
    student = (teacher + 7).requires_grad_()  # the same probabilities
    divergence_values = compute_divergence(name, top_k, teacher, student)
    divergence_values.sum().backward()
    assert divergence_values.abs().max() < 1e-6
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("top_k", [1, "all"])
def test_gradient_is_finite_for_certain_teacher(name, top_k):
    teacher = torch.full((2, 20), -300.0)
    teacher[:, 4] = 300.0
    student = torch.randn(2, 20).requires_grad_()
    compute_divergence(name, top_k, teacher, student).sum().backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_tokens_outside_shared_vocabulary_are_ignored():
    torch.manual_seed(0)
    teacher, student = torch.randn(3, 20), torch.randn(3, 24)
    actual = compute_divergence("forward-kl", "all", teacher, student)
    assert actual == pytest.approx(
        compute_divergence("forward-kl", "all", teacher, student[:, :20])
    )
