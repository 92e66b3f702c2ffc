"""Imports of a command's process, and the garbage collector during them."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch

from ftlevel.cli.startup import heavy_imports


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def test_imports_are_frozen_for_garbage_collection():
    code = (
        "import gc; from ftlevel.cli.startup import heavy_imports as block\n"
        "with block():\n    import decimal\n    print(gc.isenabled())\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 1_000)"
    )
    assert run(code) == "True True"
    assert run(code.rpartition("\n")[0]) == "False"


@pytest.mark.parametrize("has_triton", [False, True])
def test_frozen_imports_are_unfrozen_at_exit_with_triton(has_triton: bool):
    code = (
        "import atexit, gc, sys; from ftlevel.cli.startup import heavy_imports as "
        "b\natexit.register(lambda: print(gc.get_freeze_count() > 1_000))\nwith b():\n    import "
        f"decimal\n    sys.modules.update(triton=sys) if {has_triton} else None"
    )
    assert run(code) == str(not has_triton)


def test_disabled_collector_stays_disabled():
    code = (
        "import gc; gc.disable()\nfrom ftlevel.cli.startup import heavy_imports as b\nwith "
        "b():\n    import decimal\nprint(gc.isenabled(), gc.get_freeze_count())"
    )
    assert run(code) == "False 0"


def test_collector_is_unchanged_if_torch_is_already_imported():
    assert torch is sys.modules["torch"]
    before = gc.get_freeze_count()
    with heavy_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


@pytest.mark.parametrize(("value", "expected"), [("", "128"), ("7", "7")])
def test_onednn_cache_capacity_default_and_override(
    value: str, expected: str, monkeypatch: pytest.MonkeyPatch
):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.delenv(name, raising=False)
    if value:
        monkeypatch.setenv(name, value)
    assert run(f"import os, ftlevel; print(os.environ[{name!r}])") == expected
