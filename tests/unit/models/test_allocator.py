"""Tests that GPU memory has expandable segments, and never overrides the user."""

from __future__ import annotations

import pytest
import torch

from ftlevel.models.hardware import ALLOCATOR_VARIABLES, free_memory_bytes, use_expandable_segments

OTHERS = "max_split_size_mb:128"


@pytest.fixture(autouse=True)
def other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    torch._C._accelerator_setAllocatorSettings(OTHERS)


def test_setting_acts_after_initialization():
    use_expandable_segments("cuda")
    assert torch._C._accelerator_getAllocatorSettings() == "expandable_segments:True"


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_user_setting_is_not_overridden(name, monkeypatch):
    monkeypatch.setenv(name, OTHERS)
    use_expandable_segments("cuda")
    assert torch._C._accelerator_getAllocatorSettings() == OTHERS


def test_settings_are_unchanged_on_cpu():
    use_expandable_segments("cpu")
    assert torch._C._accelerator_getAllocatorSettings() == OTHERS


def test_cache_of_torch_is_free_memory(monkeypatch):
    """Of 80 bytes, 30 are allocated, and torch's cache has 40."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 30)
    assert free_memory_bytes("cuda") == 50
