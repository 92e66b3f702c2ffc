"""Tests that a resumed run uses the settings of its command with any scheduler."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainerControl, TrainerState, TrainingArguments

from ftlevel.training.callbacks import UpdateSchedule


def test_resume_with_plateau_scheduler_keeps_learning_rate(tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.25)
    args = TrainingArguments(output_dir=str(tmp_path), save_steps=3, use_cpu=True)
    state = TrainerState(global_step=2, max_steps=9, save_steps=5)
    UpdateSchedule().on_train_begin(
        args, state, TrainerControl(), optimizer=optimizer,
        lr_scheduler=ReduceLROnPlateau(optimizer),
    )  # fmt: skip
    assert state.save_steps == 3
    assert optimizer.param_groups[0]["lr"] == 0.25
