"""Tests of the times in metrics.jsonl: with and without evaluations and checkpoints."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ftlevel.events import NullListener
from ftlevel.training import callbacks as module
from ftlevel.training.callbacks import Report


class FakeClock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.now


def test_training_time_excludes_evaluations_and_checkpoints(monkeypatch, tmp_path):
    """Steps take 2 s, of which 0.5 s pass before the loss is read, as on a GPU."""
    clock = FakeClock()
    monkeypatch.setattr(module, "time", clock)
    records: list[Any] = []
    report = Report(NullListener(), records.append, lambda: 0, lambda: 0)
    arguments = (TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl())
    report.on_log(*arguments, logs={"eval_loss": 1.0})  # before the first step
    report.on_evaluate(*arguments)
    (tmp_path / "checkpoint-0").mkdir()
    clock.now += 7
    for _ in range(3):
        report.on_step_begin(*arguments)
        clock.now += 1.5
        report.on_step_end(*arguments)
        clock.now += 0.5
        report.on_log(*arguments, logs={"loss": 2.0})
        clock.now += 30
        report.on_log(*arguments, logs={"eval_loss": 1.0})
        report.on_evaluate(*arguments)
        clock.now += 20
        report.on_save(*arguments)
        clock.now += 9  # work of other callbacks on the checkpoint
    assert [record["train_s"] for record in records] == [0, 2, 2, 4, 4, 6, 6]
    assert [record["elapsed_s"] for record in records] == [0, 2, 32, 63, 93, 124, 154]
    assert report.train_s == 6
    resumed = Report(NullListener(), records.append, lambda: 5, lambda: 0)
    resumed.resume(tmp_path / "checkpoint-0")
    resumed.on_step_begin(*arguments)
    clock.now += 2
    resumed.on_log(*arguments, logs={"loss": 2.0})
    assert (records[-1]["train_s"], records[-1]["elapsed_s"], records[-1]["tokens"]) == (8, 176, 5)
