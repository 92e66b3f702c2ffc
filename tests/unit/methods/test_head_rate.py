"""New heads learn at a rate of their own, whatever optimizer it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny_models
from ftlevel.methods.rates import HeadRate, set_head_rate

HEAD = HeadRate(["classifier"], 0.5)


def lora() -> Any:
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    return get_peft_model(tiny_models.build("bert", "seqcls"), config)


@pytest.mark.parametrize("build", [lora, lambda: tiny_models.build("bert", "seqcls")])
def test_the_heads_parameters_and_no_other_get_its_rate(build: Any) -> None:
    model = build()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for p in trained.values() if p.dim() > 1]
    vectors = [p for p in trained.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for _ in range(2):  # a second call changes nothing
        set_head_rate(optimizer, model, HEAD)
        found = {
            id(p): (group["lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert len(found) == len(trained) == sum(len(g["params"]) for g in optimizer.param_groups)
        for name, parameter in trained.items():
            rate = 0.5 if "classifier" in name else 0.01
            assert found[id(parameter)] == (rate, 0.1 if parameter.dim() > 1 else 0.0), name


def test_a_schedule_multiplies_both_rates() -> None:
    model = lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    set_head_rate(optimizer, model, HEAD)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [0.005, 0.25]
