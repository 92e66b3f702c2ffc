"""Tests of the separate learning rate of new heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny_models
from ftlevel.methods.rates import HeadRate, set_head_rate

HEAD_RATE = HeadRate(["classifier"], 0.5)


def build_lora_model() -> Any:
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    return get_peft_model(tiny_models.build("bert", "seqcls"), config)


@pytest.mark.parametrize("build", [build_lora_model, lambda: tiny_models.build("bert", "seqcls")])
def test_only_head_parameters_get_head_rate(build):
    model = build()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for p in trainable.values() if p.dim() > 1]
    vectors = [p for p in trainable.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for _ in range(2):  # a second call changes nothing
        set_head_rate(optimizer, model, HEAD_RATE)
        rates = {
            id(p): (group["lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert len(rates) == len(trainable) == sum(len(g["params"]) for g in optimizer.param_groups)
        for name, parameter in trainable.items():
            rate = 0.5 if "classifier" in name else 0.01
            assert rates[id(parameter)] == (rate, 0.1 if parameter.dim() > 1 else 0.0), name


def test_scheduler_scales_both_rates():
    model = build_lora_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    set_head_rate(optimizer, model, HEAD_RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.005, 0.25]
