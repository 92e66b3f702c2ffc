"""Differences beyond noise: against normal theory, and how often chance is taken for more."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ftlevel.evaluation.intervals import MetricRuns, compute_difference


def bootstrapped(rows: np.ndarray, count: int = 2000) -> np.ndarray:
    """Return the means of draws of `rows`, drawn alike for all."""
    generator = np.random.default_rng(0)
    picks = [generator.integers(0, len(rows), len(rows)) for _ in range(count)]
    return np.array([rows[pick].mean() for pick in picks])


def scores(*seeds: np.ndarray) -> MetricRuns:
    return MetricRuns([rows.mean() for rows in seeds], np.array([bootstrapped(s) for s in seeds]))


def test_rows_are_paired() -> None:
    generator = np.random.default_rng(1)
    hard = generator.normal(0, 10, 400)  # what makes a row hard is the same for both
    better, worse = hard + 0.5, hard + generator.normal(0, 1, 400)
    apart = compute_difference(scores(worse), scores(better), 1)
    exact = (worse - better).std(ddof=1) / math.sqrt(400)
    assert apart.error == pytest.approx(exact, rel=0.1)
    assert apart.value == pytest.approx((worse - better).mean())
    assert apart.is_noise is False


def test_seeds_add_what_they_vary() -> None:
    base = np.random.default_rng(2).normal(0, 1, 100)
    found, best = scores(base, base + 1, base + 2), scores(base + 2, base + 2, base + 2)
    apart = compute_difference(found, best, 1)
    assert found.spread == pytest.approx(1)
    assert apart.error == pytest.approx(1 / math.sqrt(3))  # rows are the same: no noise of theirs
    assert compute_difference(scores(base), scores(base + 2), 1).error == pytest.approx(0, abs=1e-9)


def test_chance_is_seldom_taken_for_more() -> None:
    generator = np.random.default_rng(3)
    wrong = 0
    for _ in range(200):
        one, two = generator.normal(0, 1, (2, 60))
        draws = np.array([bootstrapped(rows, 200) for rows in (one, two)])
        first, second = (
            MetricRuns([r.mean()], d[None]) for r, d in zip((one, two), draws, strict=True)
        )
        wrong += compute_difference(first, second, 1).is_noise is False
    assert 1 <= wrong <= 22  # 5 % of 200 are 10, with 3.1 of chance


def test_more_comparisons_ask_for_more() -> None:
    rows = np.random.default_rng(4).normal(0, 1, 100)
    rows -= rows.mean()
    shift = 2.2 / math.sqrt(100)
    found, best = scores(rows + shift), scores(np.zeros(100))
    assert compute_difference(found, best, 1).is_noise is False
    assert compute_difference(found, best, 10).is_noise is True


def test_without_draws_nothing_is_said() -> None:
    none = MetricRuns([1.0], np.empty((1, 0)))
    apart = compute_difference(none, MetricRuns([2.0], np.empty((1, 0))), 1)
    assert (apart.value, apart.interval, apart.is_noise) == (-1.0, None, None)
    assert none.interval is None
