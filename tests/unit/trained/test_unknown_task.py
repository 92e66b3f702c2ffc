"""Adapters whose task was added by a package that is not installed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftlevel.errors import InputError
from ftlevel.models.sources import ModelSource
from ftlevel.trained.model_ref import ModelRef


def test_task_of_a_missing_package_is_named():
    card: Any = SimpleNamespace(task="ranking", options={})
    ref = ModelRef(ModelSource("base", "directory", "base"), Path("run/adapter"), card)
    with pytest.raises(InputError, match="run/adapter: its task 'ranking' is not installed"):
        _ = ref.configured_task
