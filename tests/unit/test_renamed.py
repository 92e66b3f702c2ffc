"""Public names of 0.1.0 that were renamed: each works for one release, with a warning."""

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
def test_an_old_name_gives_the_new_object_with_a_warning(old: str, new: str) -> None:
    (old_module, _, old_name), (new_module, _, new_name) = old.rpartition("."), new.rpartition(".")
    expected = getattr(importlib.import_module(new_module), new_name)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new};") as warned:
        assert getattr(importlib.import_module(old_module), old_name) is expected
    assert warned[0].filename == __file__


@pytest.mark.parametrize("module", ["ftlevel", "ftlevel.events", "ftlevel.config"])
def test_an_unknown_name_is_an_attribute_error(module: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'gone'"):
        importlib.import_module(module).gone  # noqa: B018 - raises


def test_the_old_name_of_a_field() -> None:
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


def test_importing_ftlevel_imports_nothing_else() -> None:
    code = "import sys, ftlevel; print([m for m in ('pydantic', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
