"""What a command's own process imports, and what the collector is asked to go through."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch

from ftlevel.cli.startup import heavy_imports

UNUSED = ("sklearn", "sacrebleu", "nltk", "rouge_score", "seqeval", "matplotlib", "langdetect")
"""Of metrics and plots: text-generation is scored by its loss alone."""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow  # imports torch, transformers and PEFT
def test_training_on_text_imports_no_metric_and_no_plot():
    code = (
        "import sys; from ftlevel.cli.app import run; "
        "assert run(['train', '--dry-run', '--quiet', '--max-samples', '40']) == 0; "
        f"print([m for m in {UNUSED!r} if m in sys.modules], 'datasets' in sys.modules)"
    )
    assert run(code) == "[] True"  # Trainer's own module imports datasets


def test_imports_of_a_fresh_process_are_left_out_of_collections():
    code = (
        "import gc; from ftlevel.cli.startup import heavy_imports as block\n"
        "with block():\n    import decimal\n    print(gc.isenabled())\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 1_000)"
    )
    assert run(code) == "True True"
    assert run(code.rpartition("\n")[0]) == "False"


@pytest.mark.parametrize("has_triton", [False, True])
def test_what_was_left_out_is_collected_at_the_end_where_triton_counts_it(has_triton: bool):
    code = (
        "import atexit, gc, sys; from ftlevel.cli.startup import heavy_imports as "
        "b\natexit.register(lambda: print(gc.get_freeze_count() > 1_000))\nwith b():\n    import "
        f"decimal\n    sys.modules.update(triton=sys) if {has_triton} else None"
    )
    assert run(code) == str(not has_triton)


def test_a_collector_that_is_off_stays_off():
    code = (
        "import gc; gc.disable()\nfrom ftlevel.cli.startup import heavy_imports as b\nwith "
        "b():\n    import decimal\nprint(gc.isenabled(), gc.get_freeze_count())"
    )
    assert run(code) == "False 0"


def test_where_torch_is_imported_already_the_collector_is_nobody_elses_business():
    assert torch is sys.modules["torch"]
    before = gc.get_freeze_count()
    with heavy_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


@pytest.mark.parametrize(("said", "kept"), [("", "128"), ("7", "7")])
def test_code_is_kept_for_the_shapes_of_a_step_unless_somebody_says_otherwise(
    said: str, kept: str, monkeypatch: pytest.MonkeyPatch
):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.delenv(name, raising=False)
    if said:
        monkeypatch.setenv(name, said)
    assert run(f"import os, ftlevel; print(os.environ[{name!r}])") == kept
