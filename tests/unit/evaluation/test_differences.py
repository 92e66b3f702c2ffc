"""Significance of differences: against normal theory, and the rate of false positives."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ftlevel.evaluation.intervals import MetricRuns, compute_difference


def bootstrap_means(rows: np.ndarray, count: int = 2000) -> np.ndarray:
    """Return bootstrap means of `rows`, with equal resamples for all calls."""
    generator = np.random.default_rng(0)
    resamples = [generator.integers(0, len(rows), len(rows)) for _ in range(count)]
    return np.array([rows[resample].mean() for resample in resamples])


def make_runs(*seeds: np.ndarray) -> MetricRuns:
    return MetricRuns(
        [rows.mean() for rows in seeds], np.array([bootstrap_means(s) for s in seeds])
    )


def test_rows_are_paired():
    generator = np.random.default_rng(1)
    difficulty = generator.normal(0, 10, 400)  # the difficulty of a row is equal for both models
    better, worse = difficulty + 0.5, difficulty + generator.normal(0, 1, 400)
    difference = compute_difference(make_runs(worse), make_runs(better), 1)
    exact = (worse - better).std(ddof=1) / math.sqrt(400)
    assert difference.error == pytest.approx(exact, rel=0.1)
    assert difference.value == pytest.approx((worse - better).mean())
    assert difference.is_noise is False


def test_seed_variance_adds_to_error():
    base = np.random.default_rng(2).normal(0, 1, 100)
    runs, best = make_runs(base, base + 1, base + 2), make_runs(base + 2, base + 2, base + 2)
    difference = compute_difference(runs, best, 1)
    assert runs.spread == pytest.approx(1)
    assert difference.error == pytest.approx(1 / math.sqrt(3))  # equal rows, so no noise from rows
    assert compute_difference(make_runs(base), make_runs(base + 2), 1).error == pytest.approx(
        0, abs=1e-9
    )


def test_false_positive_rate():
    generator = np.random.default_rng(3)
    false_positives = 0
    for _ in range(200):
        first_scores, second_scores = generator.normal(0, 1, (2, 60))
        draws = np.array([bootstrap_means(rows, 200) for rows in (first_scores, second_scores)])
        first, second = (
            MetricRuns([r.mean()], d[None])
            for r, d in zip((first_scores, second_scores), draws, strict=True)
        )
        false_positives += compute_difference(first, second, 1).is_noise is False
    assert 1 <= false_positives <= 22  # 5 % of 200 is 10, with a standard deviation of 3.1


def test_multiple_comparisons_raise_threshold():
    rows = np.random.default_rng(4).normal(0, 1, 100)
    rows -= rows.mean()
    shift = 2.2 / math.sqrt(100)
    runs, best = make_runs(rows + shift), make_runs(np.zeros(100))
    assert compute_difference(runs, best, 1).is_noise is False
    assert compute_difference(runs, best, 10).is_noise is True


def test_no_resamples_give_no_interval():
    none = MetricRuns([1.0], np.empty((1, 0)))
    difference = compute_difference(none, MetricRuns([2.0], np.empty((1, 0))), 1)
    assert (difference.value, difference.interval, difference.is_noise) == (-1.0, None, None)
    assert none.interval is None
