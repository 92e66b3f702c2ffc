"""Tests of default learning rates: measured values, published values and their interpolation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ftlevel.config import SPECS
from ftlevel.methods import METHODS
from ftlevel.methods.rates import DEEP_HEAD, HEAD, RateInputs, Rates, get_head_rate

KINDS = ("encoder", "decoder", "encoder-decoder")
WIDTHS = (64, 192, 384, 576, 768, 1024, 2048, 4096, 8192)
STEPS = (1, 10, 25, 100, 400, 1000, 3000, 100_000)
METHOD_VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in SPECS),
    ("lora", {"use_rslora": True}),
    ("lora", {"use_dora": True}),
    ("prefix", {"prefix_projection": True}),
    ("full", {"freeze_base": True}),
    *(("adapter", {"placement": name}) for name in ("pfeiffer", "parallel")),
]


def get_rates(kind: str, fields: dict[str, Any]) -> Rates:
    return METHODS[kind].rates(SPECS[kind](**fields))


@pytest.mark.parametrize(("kind", "fields"), METHOD_VARIANTS)
def test_every_method_has_rate_within_bounds(kind, fields):
    rates = get_rates(kind, fields)
    for model, width, head, steps in itertools.product(KINDS, WIDTHS, (True, False), STEPS):
        assert 1e-6 <= rates.rate(RateInputs(model, width, head, steps)) <= 1


HEADS = [pytest.param(rates, id=name) for name, rates in (("head", HEAD), ("deep", DEEP_HEAD))]


@pytest.mark.parametrize("rates", [*(get_rates(*form) for form in METHOD_VARIANTS), *HEADS])
def test_rate_decreases_with_steps_and_width(rates):
    for model in KINDS:
        table = [[rates.rate(RateInputs(model, w, True, s)) for s in STEPS] for w in WIDTHS]
        assert all(row == sorted(row, reverse=True) for row in table)
        columns = map(list, zip(*table, strict=True))
        assert all(column == sorted(column, reverse=True) for column in columns)


@pytest.mark.parametrize(("kind", "fields"), METHOD_VARIANTS)
def test_wide_model_and_long_run_get_published_rate(kind, fields):
    rates = get_rates(kind, fields)
    for model in KINDS:
        choice = rates.get_choice(kind, RateInputs(model, 8192, False, 100_000))
        assert choice.value == float(f"{rates.large:.0e}")
        assert choice.reason.endswith(f"of hidden size 8,192 and 100,000 steps; {rates.source}")


def test_rate_is_interpolated_in_log_space():
    rates = Rates(small=1e-2, large=1e-4, source="a paper")
    width, steps = round((384 * 4096) ** 0.5), round((100 * 3000) ** 0.5)
    for run, rate in (
        ((384, 100), 1e-2), ((4096, 3000), 1e-4), ((width, steps), 1e-3), ((4096, 100), 1e-3),
        ((384, 3000), 1e-3),
    ):  # fmt: skip
        assert rates.rate(RateInputs("decoder", run[0], False, run[1])) == rate
    choice = rates.get_choice("x", RateInputs("decoder", 4096, False, 100))
    assert str(choice) == (
        "0.001 (default for x on a decoder of hidden size 4,096 and 100 steps; 0.01 on short runs, "
        "0.0001 on long ones, a paper)"
    )


def test_rate_by_architecture_overrides_small_rate():
    rates = Rates(small=1e-2, large=1e-4, source="a", by_architecture={"encoder-decoder": 1e-1})
    runs = ((128, False, 100), (128, True, 100), (4096, False, 3000))
    assert [rates.rate(RateInputs("encoder-decoder", *run)) for run in runs] == [1e-1, 1e-2, 1e-4]


def test_full_fine_tuning_of_bert_gets_paper_rate():
    assert get_rates("full", {}).rate(RateInputs("encoder", 768, True, 3000)) == 2e-5


def test_deep_head_has_lower_rate_than_linear_head():
    for deep_head, rate in ((False, 2e-2), (True, 5e-3)):
        run = RateInputs("encoder", 384, True, 100, deep_head=deep_head)
        assert get_head_rate(run).value == rate


def test_lora_plus_gets_lower_rate_than_other_variants():
    inputs = RateInputs("encoder", 384, False, 100)
    forms = ({}, {"use_dora": True}, {"use_rslora": True}, {"lora_plus_ratio": 16})
    assert [get_rates("lora", form).rate(inputs) for form in forms] == [1e-3, 1e-3, 1e-3, 3e-4]


def test_token_head_gets_higher_rate():
    row = RateInputs("encoder", 384, True, 60)
    tokens = RateInputs("encoder", 384, True, 60, token_head=True)
    assert str(tokens) == "an encoder of hidden size 384 with a new head for tokens and 60 steps"
    for kind, expected in (("lora", [1e-3, 3e-3]), ("full", [1e-4, 3e-4]), ("ia3", [3e-2, 9e-2])):
        assert [get_rates(kind, {}).rate(run) for run in (row, tokens)] == expected
    rslora = get_rates("lora", {"use_rslora": True})
    assert rslora.rate(row) > 5e-4, "where spans have 0.85 and not 0.97 of F1"
    assert get_rates("boft", {}).rate(row) > 3e-3, "where spans have 0.84 and not 0.98 of F1"
    assert get_rates("vera", {}).rate(row) > 3e-2, "where spans have 0.83 and not 0.93 of F1"
    pfeiffer = get_rates("adapter", {"placement": "pfeiffer"})
    assert pfeiffer.rate(row) > 3e-3, "where spans have 0.78 and not 0.86 of F1"
    projected = get_rates("prefix", {"prefix_projection": True})
    assert projected.rate(row) < 3e-3, "where it has none of eight classes, with any of three seeds"
    assert projected.rate(tokens) < 9e-3, "likewise of tags"
    text = RateInputs("decoder", 576, False, 25)
    olora = get_rates("lora", {"init_lora_weights": "olora"})
    assert olora.rate(text) < 1e-3, "where SmolLM2 ends at 3.27, and at 3.68 with LoRA's 2e-3"
    assert projected.rate(text) < 3e-3, "where SmolLM2 ends at a loss of 8.9"
