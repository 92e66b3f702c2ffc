"""What the listener and metrics.jsonl get of a run's course: time with and without its pauses."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from ftlevel.events import NullListener
from ftlevel.training import callbacks as module
from ftlevel.training.callbacks import Report


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.now


def test_time_of_training_is_without_evaluations_and_checkpoints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Steps of 2 s, of which 0.5 s pass before their loss is read, as a GPU's do."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    written: list[Any] = []
    report = Report(NullListener(), written.append, lambda: 0, lambda: 0)
    told = (TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl())
    report.on_log(*told, logs={"eval_loss": 1.0})  # before the first step
    report.on_evaluate(*told)
    clock.now += 7
    for _ in range(3):
        report.on_step_begin(*told)
        clock.now += 1.5
        report.on_step_end(*told)
        clock.now += 0.5
        report.on_log(*told, logs={"loss": 2.0})
        clock.now += 30
        report.on_log(*told, logs={"eval_loss": 1.0})
        report.on_evaluate(*told)
        clock.now += 20
        report.on_save(*told)
        clock.now += 9  # other callbacks' work on the checkpoint
    assert [record["train_s"] for record in written] == [0, 2, 2, 4, 4, 6, 6]
    assert [record["elapsed_s"] for record in written] == [0, 2, 32, 63, 93, 124, 154]
    assert report.train_s == 6
