"""Rows for PEFT's test tables: our tuners, and the tests that do not apply to one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

import ftlevel.adapters  # noqa: F401 - makes PEFT know our tuners
from ftlevel.methods.bottleneck.layer import BottleneckConfig
from ftlevel.methods.prefix.model import PrefixKvConfig
from ftlevel.methods.soft_prompt.layer import SoftPromptConfig
from peft_suites.models import TOKENS

TEN = {"num_virtual_tokens": 10}
# Of four tokens and four units of ReLU, all can be dead in one pass of two: a test compares the
# gradients of passes that the base's dropout makes different.
_ALIVE = {"non_linearity": "gelu"}


@dataclass(frozen=True)
class Row:
    """One row: a tuner in one of its forms."""

    tuner: str
    form: str
    config_cls: type
    kwargs: dict[str, Any]

    @property
    def id(self) -> str:
        """Return what names the row in a test's id."""
        return f"ours:{self.tuner}-{self.form}"


ROWS = [
    Row("bottleneck", "houlsby", BottleneckConfig, _ALIVE),
    Row("bottleneck", "pfeiffer", BottleneckConfig, {**_ALIVE, "placement": "pfeiffer"}),
    Row("bottleneck", "parallel", BottleneckConfig, {**_ALIVE, "placement": "parallel"}),
    Row("prefix", "plain", PrefixKvConfig, TEN),
    Row("prefix", "projected", PrefixKvConfig,
        {**TEN, "prefix_projection": True, "encoder_hidden_size": 32}),
    Row("prompt", "vocabulary", SoftPromptConfig, TEN),
    Row("prompt", "random", SoftPromptConfig, {**TEN, "random_init": True}),
    Row("prompt", "second", SoftPromptConfig, {**TEN, "tokens_before": 1}),
    Row("p-tuning", "mlp", SoftPromptConfig, {**TEN, "encoder": "MLP", "encoder_hidden_size": 32}),
    Row("p-tuning", "lstm", SoftPromptConfig, {**TEN, "encoder": "LSTM"}),
]  # fmt: skip
TUNERS = tuple(dict.fromkeys(row.tuner for row in ROWS))

_WIDE = {"bottleneck_dim": 8, **_ALIVE}
_LINEARS: list[tuple[str, str, dict[str, Any]]] = [
    ("lin0", "MLP", {"target_modules": "lin0"}),
    ("list", "MLP", {"target_modules": ["lin0"]}),
    ("lin1", "MLP", {"target_modules": ["lin1"]}),
    ("both", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("saved", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("excluded", "MLP", {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]}),
    ("narrow", "MLP", {"target_modules": ["lin0"], "bottleneck_dim": 3}),
    ("dropout", "MLP", {"target_modules": ["lin0"], "adapter_dropout": 0.1}),
    ("norms", "MLP_LayerNorm", {"target_modules": ["lin0", "lin1"], **_WIDE}),
    ("conv1d", "EmbConv1D", {"target_modules": ["conv1d"], **_WIDE}),
    ("parallel lin0", "MLP", {"target_modules": ["lin0"], "placement": "parallel"}),
    ("parallel both", "MLP", {"target_modules": ["lin0", "lin1"], "placement": "parallel"}),
]


def rows_of(tuner: str) -> list[Row]:
    """Return the forms of a tuner."""
    return [row for row in ROWS if row.tuner == tuner]


def task_rows(tuner: str, task: str) -> list[Any]:
    """Return (config_cls, config_kwargs) for models of transformers."""
    return [
        pytest.param(row.config_cls, {"task_type": task, **row.kwargs}, id=row.id)
        for row in rows_of(tuner)
    ]


def custom_rows(tuner: str) -> list[Any]:
    """Return (test_name, model_id, config_cls, config_kwargs) for models of PEFT's tests."""
    on_tokens = [(row.form, TOKENS, row.config_cls, row.kwargs) for row in rows_of(tuner)]
    linears = [(form, model, BottleneckConfig, kwargs) for form, model, kwargs in _LINEARS]
    rows = [*(linears if tuner == "bottleneck" else []), *on_tokens]
    return [pytest.param(*row, id=f"ours:{tuner}-{row[0]}-{row[1]}") for row in rows]


def config_rows(tuner: str, names: tuple[str, ...], *, linears: bool = False) -> list[Any]:
    """Return rows of a configuration alone, where its defaults do.

    Args:
        tuner: ours.
        names: config_cls, or config_class and mandatory_kwargs.
        linears: for tests that put it on linears, which virtual tokens are not put on.
    """
    if linears and tuner != "bottleneck":
        return []
    first = rows_of(tuner)[0]
    return [pytest.param(*(first.config_cls, {})[: len(names)], id=first.id)]


def compile_rows(tuner: str) -> list[Any]:
    """Return (config, arguments of torch.compile) for a causal language model."""
    how = {"backend": "aot_eager", "torch_compile_backend": "aot_eager"}
    return [
        pytest.param((row.config_cls(task_type="CAUSAL_LM", **row.kwargs), how), id=row.id)
        for row in rows_of(tuner)
    ]


BEGINS_ELSEWHERE = "asks that an adapter begins as the identity; virtual tokens are always seen"
IMPOSSIBLE: dict[tuple[str, str], str] = {
    **{(tuner, "test_disable_adapters"): BEGINS_ELSEWHERE
       for tuner in ("prefix", "prompt", "p-tuning")},
    **{(tuner, "test_from_pretrained_cache_dir"): "reads from the Hub" for tuner in TUNERS},
}  # fmt: skip
"""(tuner, test) → why no adapter of the kind can pass it: these are counted apart."""
