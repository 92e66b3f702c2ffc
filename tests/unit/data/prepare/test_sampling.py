"""Length-grouped sampling: every row once per epoch, grouped by length, reproducible."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ftlevel.data.prepare.samplers import LengthGroupedSampler

LENGTHS = [(7 * i) % 100 + 1 for i in range(400)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(1, 9), st.integers(0, 3))
def test_sampler_returns_every_row_once(lengths, step, epoch):
    sampler = LengthGroupedSampler(lengths, step, seed=1)
    sampler.epoch = epoch
    order = list(sampler)
    assert len(sampler) == len(lengths)
    assert sorted(order) == list(range(len(lengths)))


def test_steps_have_similar_lengths_and_are_shuffled():
    order = list(LengthGroupedSampler(LENGTHS, 8, seed=1))
    steps = [[LENGTHS[row] for row in order[i : i + 8]] for i in range(0, len(order), 8)]
    assert max(max(step) - min(step) for step in steps) < 10
    firsts = [step[0] for step in steps]
    assert firsts != sorted(firsts)


def test_order_depends_on_seed_and_epoch():
    sampler = LengthGroupedSampler(LENGTHS, 8, seed=1)
    first = list(sampler)
    sampler.epoch = 1
    second = list(sampler)
    assert first != second
    resumed = LengthGroupedSampler(LENGTHS, 8, seed=1)
    resumed.epoch = 1
    assert list(resumed) == second
    assert list(LengthGroupedSampler(LENGTHS, 8, seed=2)) != first
