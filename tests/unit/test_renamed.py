"""Renamed public names of 0.1.0 work for one release, with a warning."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import ftlevel
from ftlevel.config import MergeConfig


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ftlevel.events.Silence", "ftlevel.events.NullListener"),
        ("ftlevel.config.normal_task", "ftlevel.config.normalize_task"),
        ("ftlevel.config.CheckServedConfig", "ftlevel.extras.serving.config.CheckServedConfig"),
    ],
)
def test_old_name_returns_new_object_with_warning(old: str, new: str) -> None:
    (old_module, _, old_name), (new_module, _, new_name) = old.rpartition("."), new.rpartition(".")
    expected = getattr(importlib.import_module(new_module), new_name)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new};") as warnings_raised:
        assert getattr(importlib.import_module(old_module), old_name) is expected
    assert warnings_raised[0].filename == __file__


@pytest.mark.parametrize("module", ["ftlevel", "ftlevel.events", "ftlevel.config"])
def test_unknown_name_raises_attribute_error(module: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'gone'"):
        importlib.import_module(module).gone  # noqa: B018 - raises


def test_old_field_name_warns() -> None:
    with pytest.warns(DeprecationWarning, match="base_model"):
        config = MergeConfig(adapters=["run"], output_dir="out", base="elsewhere")
    assert config.base_model == "elsewhere"


def test_names_of_0_1_0_are_public() -> None:
    names = """EvaluateConfig Evaluation FineTunePipeLine MergeConfig MergeResult PredictConfig
        Predictions QuantizeConfig QuantizeResult TrainConfig TrainResult evaluate generate
        list_targets merge predict quantize train"""
    assert set(names.split()) <= set(ftlevel.__all__)
    for name in ftlevel.__all__:
        assert getattr(ftlevel, name).__module__.startswith("ftlevel.")


def test_import_ftlevel_is_lightweight() -> None:
    code = "import sys, ftlevel; print([m for m in ('pydantic', 'torch') if m in sys.modules])"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "[]"
