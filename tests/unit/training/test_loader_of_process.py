"""The data loader of one of several processes: batches on its device, like those of one process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from accelerate import skip_first_batches
from torch.utils.data import SequentialSampler

from ftlevel.data.encoding.row import Encoded
from ftlevel.fast.plan import FastPlan
from ftlevel.fast.step_collator import StepCollator
from ftlevel.training.trainer import create_dataloader

ROWS = [Encoded([5] * (1 + n % 4), [5] * (1 + n % 4), n) for n in range(11)]


def build_loader(device: str, rank: int = 0, *, pin: bool = False) -> Any:
    args = SimpleNamespace(
        train_batch_size=2, world_size=2, process_index=rank, device=torch.device(device),
        dataloader_pin_memory=pin, accelerator_config=SimpleNamespace(non_blocking=True),
    )  # fmt: skip
    collate = StepCollator(0, FastPlan(enabled=True, packs=True, tokens=64, workers=1))
    return create_dataloader(ROWS, SequentialSampler(ROWS), args, collate, [1] * len(ROWS))


def get_tensors(batch: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors of the micro-batches, also those of their layouts."""
    values = [value for part in batch["micro_batches"] for value in part.values()]
    layouts = [value for value in values if hasattr(value, "restore")]
    assert layouts
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return [*tensors, *(tensor for each in layouts for tensor in (each.source, each.restore))]


def test_batches_are_on_device_of_process():
    """Also the layouts of micro-batches, and after batches are skipped, as on resume."""
    loader = build_loader("meta")
    for batch in (*loader, *skip_first_batches(loader, 1)):
        assert {tensor.device.type for tensor in get_tensors(batch)} == {"meta"}


def test_batches_are_pinned_and_copied_without_waiting(monkeypatch):
    pinned: set[int] = set()
    copies = []

    def pin(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        copy = tensor.clone()
        pinned.add(id(copy))
        kept.append(copy)
        return copy

    def to(tensor: torch.Tensor, *_: Any, non_blocking: bool = False) -> torch.Tensor:
        copies.append((id(tensor) in pinned, non_blocking))
        return tensor

    kept: list[torch.Tensor] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    batches = list(build_loader("cpu", pin=True))
    assert len(copies) >= len(batches) * 4
    assert set(copies) == {(True, True)}


def test_skipped_batches_are_those_of_an_uninterrupted_epoch():
    for rank in (0, 1):
        loader = build_loader("cpu", rank)
        all_rows = [[row.row for row in batch["rows"]] for batch in loader]
        rest = [[row.row for row in batch["rows"]] for batch in skip_first_batches(loader, 2)]
        assert rest == all_rows[2:]
