"""Constraints between settings: their conditions and their messages."""

from __future__ import annotations

import pytest

from ftlevel.config import SPECS, TrainConfig
from ftlevel.config.constraints import Excludes, Needs, NoEffect, list_violations
from ftlevel.config.train import CONSTRAINTS
from ftlevel.extras.rl.config import CONSTRAINTS as RL_CONSTRAINTS


def list_conditions() -> list[str]:
    """Return all conditions of the table."""
    return [
        condition
        for constraint in (*CONSTRAINTS, *RL_CONSTRAINTS)
        for condition in (constraint.setting, constraint.other, *constraint.when.split(" & "))
        if condition
    ]


@pytest.mark.parametrize(
    "path", sorted({c.split("!=")[0].split("=")[0] for c in list_conditions()})
)
def test_conditions_name_fields(path):
    section, _, name = path.partition(" ")[0].partition(".")
    sections = SPECS.values() if section == "method" else [type(getattr(TrainConfig(), section))]
    assert not name or any(name in model.model_fields for model in sections)
    assert section in TrainConfig.model_fields


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Needs("train.optim=sgd", "output.dir RUN"),
         "--optim sgd needs --output-dir RUN. Add --output-dir RUN, or drop --optim."),
        (Needs("train.optim=sgd", "quant.kind=4bit|8bit", "it is heavy"),
         "--optim sgd needs --quant 4bit or 8bit (it is none): it is heavy. Add --quant 4bit or "
         "8bit, or drop --optim."),
        (Excludes("train.optim", "data.cache=True", "both"),
         "--optim sgd cannot be used with --cache: both. Drop one of them."),
        (NoEffect("rl.top_p", "train.optim!=lion", fix="Leave it."),
         "--top-p 0.5 has no effect with --optim sgd. Leave it."),
        (Needs("train.optim=sgd", "rl.top_p"), None),
        (Excludes("train.optim", "data.mix"), None),
        (Excludes("train.optim", "rl.top_p", when="data.mix & train.optim"), None),
    ],
)  # fmt: skip
def test_messages(constraint, message):
    config = TrainConfig.model_construct(
        **{name: getattr(TrainConfig(), name) for name in TrainConfig.model_fields}
        | {
            "train": TrainConfig(train={"optim": "sgd"}).train,
            "rl": TrainConfig().rl.model_copy(update={"top_p": 0.5}),
        }
    )
    assert list(list_violations(config, [constraint])) == ([message] if message else [])


def test_invalid_condition_raises():
    with pytest.raises(ValueError, match="is not a condition"):
        list(list_violations(TrainConfig(), [Needs("train=", "data.mix")]))
