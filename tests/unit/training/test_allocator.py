"""Tests that the allocator variable has torch's name for it and never overrides the user."""

from __future__ import annotations

import os

import pytest
import torch

from ftlevel.training.memory import ALLOCATOR_CONF, NAME, OLD_NAME, use_expandable_segments


@pytest.fixture(autouse=True)
def clear_allocator_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (NAME, OLD_NAME):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("version", "name"),
    [("2.8.0+cu128", OLD_NAME), ("2.9.1", OLD_NAME), ("2.10.0", OLD_NAME), ("2.11.0", NAME),
     ("2.13.0+cu130", NAME)],
)  # fmt: skip
def test_variable_name_depends_on_torch_version(
    version: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    use_expandable_segments("cuda")
    assert {n: os.environ[n] for n in (NAME, OLD_NAME) if n in os.environ} == {name: ALLOCATOR_CONF}


def test_user_setting_is_not_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OLD_NAME, "max_split_size_mb:128")
    use_expandable_segments("cuda")
    assert os.environ[OLD_NAME] == "max_split_size_mb:128"
    assert NAME not in os.environ


def test_variable_is_not_set_on_cpu() -> None:
    use_expandable_segments("cpu")
    assert NAME not in os.environ
    assert OLD_NAME not in os.environ
