"""`--rollouts URL`: a run that samples with a server in another process, and servers at fault."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import completions_server
from forked import Forked
from ftlevel.commands.train import train
from ftlevel.config import TrainConfig
from ftlevel.errors import ConfigError, RunError
from tiny_models import save_tiny

REWARDS = """
def vowels(completions, **kwargs):
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]
"""

Serve = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with prompts, a reward function and a model."""
    path = tmp_path_factory.mktemp("served")
    rows = [{"prompt": f'def f{i}(a, b):\n    """'} for i in range(4)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "rewards.py").write_text(REWARDS)
    save_tiny(path / "model", "llama", chat=True)
    return path


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return what starts a server of a model and returns its address."""
    started: list[Forked] = []

    def start(model: Path, fault: str = "none") -> str:
        call = (completions_server.serve, (str(model), fault))
        started.append(Forked(call=call, stdout=subprocess.PIPE))
        stdout = started[-1].stdout
        assert stdout is not None
        return f"http://127.0.0.1:{int(stdout.readline())}"

    yield start
    for process in started:
        process.kill()
        process.wait()


def config(folder: Path, out: Path, url: str, **rl: Any) -> TrainConfig:
    return TrainConfig(
        task="rl",
        model={"name_or_path": str(folder / "model"), "dtype": "float32"},
        data={"dataset": str(folder / "rows.jsonl")},
        rl={
            "reward": [f"{folder}/rewards.py:vowels"],
            "num_generations": 3,
            "max_completion_length": 8,
            "check_groups": 0,
            "rollouts": url,
            **rl,
        },
        train={
            "max_steps": 3,
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
        },
        speed={"verify": False},
        output={"dir": out},
    )


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.sweep), 0.7])
def test_a_run_samples_with_the_server(
    folder: Path, tmp_path: Path, serve: Serve, temperature: float
) -> None:
    url = serve(folder / "model")
    train(config(folder, tmp_path / "run", url, temperature=temperature))
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    records = [record for record in lines if "loss" in record]
    assert len(records) == 3
    assert max(record["sampler_difference"] for record in records) < 1e-5
    assert "entropy" not in records[0]


def test_a_server_that_keeps_the_former_weights_stops_the_run(
    folder: Path, tmp_path: Path, serve: Serve
) -> None:
    url = serve(folder / "model", "stale")
    with pytest.raises(RunError, match="the server answers with other weights") as error:
        train(config(folder, tmp_path / "run", url))
    assert "from those of the former adapter" in str(error.value)


def test_a_server_with_another_base_stops_the_run(
    folder: Path, tmp_path: Path, serve: Serve
) -> None:
    other = save_tiny(tmp_path / "other", "llama", chat=True, seed=7)
    with pytest.raises(RunError, match="the server answers with other weights"):
        train(config(folder, tmp_path / "run", serve(other)))


def test_a_server_without_adapters_is_refused(folder: Path, tmp_path: Path, serve: Serve) -> None:
    url = serve(folder / "model", "no-lora")
    with pytest.raises(ConfigError, match="cannot load adapters at run time"):
        train(config(folder, tmp_path / "run", url), dry_run=True)


def test_no_server_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no server answers"):
        train(config(folder, tmp_path / "run", "http://127.0.0.1:9"), dry_run=True)
