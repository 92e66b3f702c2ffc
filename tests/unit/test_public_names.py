"""Public names of the package."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import ftlevel


@pytest.mark.parametrize("module", ["ftlevel"])
def test_unknown_name_raises_attribute_error(module):
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'gone'"):
        importlib.import_module(module).gone  # noqa: B018 - raises


def test_names_of_0_1_0_are_public():
    names = """EvaluateConfig Evaluation FineTunePipeLine MergeConfig MergeResult PredictConfig
        Predictions QuantizeConfig QuantizeResult TrainConfig TrainResult evaluate generate
        list_targets merge predict quantize train"""
    assert set(names.split()) <= set(ftlevel.__all__)
    for name in ftlevel.__all__:
        assert getattr(ftlevel, name).__module__.startswith("ftlevel.")


def test_import_ftlevel_is_lightweight():
    code = "import sys, ftlevel; print([m for m in ('pydantic', 'torch') if m in sys.modules])"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "[]"
