"""`--rollouts URL`: sampling with a server in another process, and faulty servers."""

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
from ftlevel.extras.rl.server import ServerSampler
from tiny_models import save_tiny

REWARDS = """
def vowels(completions, **kwargs):
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]
"""

StartServer = Callable[..., str]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with prompts, a reward function and a model."""
    path = tmp_path_factory.mktemp("served")
    rows = [{"prompt": f'def f{i}(a, b):\n    """'} for i in range(4)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "rewards.py").write_text(REWARDS)
    save_tiny(path / "model", "llama", chat=True)
    return path


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Return a function that starts a server of a model and returns its URL."""
    processes: list[Forked] = []

    def start(model: Path, fault: str = "none") -> str:
        call = (completions_server.serve, (str(model), fault))
        processes.append(Forked(call=call, stdout=subprocess.PIPE))
        stdout = processes[-1].stdout
        assert stdout is not None
        return f"http://127.0.0.1:{int(stdout.readline())}"

    yield start
    for process in processes:
        process.kill()
        process.wait()


def create_config(data_dir: Path, out: Path, url: str, **rl: Any) -> TrainConfig:
    return TrainConfig(
        task="rl",
        model={"name_or_path": str(data_dir / "model"), "dtype": "float32"},
        data={"dataset": str(data_dir / "rows.jsonl")},
        rl={
            "reward": [f"{data_dir}/rewards.py:vowels"],
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
def test_run_samples_with_server(
    data_dir: Path,
    tmp_path: Path,
    start_server: StartServer,
    temperature: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_weights, num_adapters = ServerSampler._check_weights, list[int]()

    def check_and_count(self: ServerSampler, *arguments: Any) -> None:
        num_adapters.append(len(list(Path(self._workspace.name).iterdir())))
        check_weights(self, *arguments)

    monkeypatch.setattr(ServerSampler, "_check_weights", check_and_count)
    url = start_server(data_dir / "model")
    train(create_config(data_dir, tmp_path / "run", url, temperature=temperature))
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    records = [record for record in lines if "loss" in record]
    assert len(records) == 3
    assert max(record["sampler_difference"] for record in records) < 1e-5
    assert "entropy" not in records[0]
    assert num_adapters == [1, 1, 1]


def test_server_with_stale_weights_raises(
    data_dir: Path, tmp_path: Path, start_server: StartServer
) -> None:
    url = start_server(data_dir / "model", "stale")
    with pytest.raises(RunError, match="the server answers with other weights") as error:
        train(create_config(data_dir, tmp_path / "run", url))
    assert "from those of the former adapter" in str(error.value)


@pytest.mark.parametrize("other", [{"seed": 7}, {"vocab_size": 5000}], ids=["seed", "vocabulary"])
def test_server_with_other_base_raises(
    data_dir: Path, tmp_path: Path, start_server: StartServer, other: dict[str, Any]
) -> None:
    other_base = save_tiny(tmp_path / "other", "llama", chat=True, **other)
    with pytest.raises(RunError, match="the server answers with other weights"):
        train(create_config(data_dir, tmp_path / "run", start_server(other_base)))


def test_server_without_lora_support_raises(
    data_dir: Path, tmp_path: Path, start_server: StartServer
) -> None:
    url = start_server(data_dir / "model", "no-lora")
    with pytest.raises(ConfigError, match="cannot load adapters at run time"):
        train(create_config(data_dir, tmp_path / "run", url), dry_run=True)


def test_unreachable_server_raises(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no server answers"):
        train(create_config(data_dir, tmp_path / "run", "http://127.0.0.1:9"), dry_run=True)


def test_server_without_http_raises(data_dir: Path, tmp_path: Path) -> None:
    with (
        completions_server.server_without_http() as url,
        pytest.raises(ConfigError, match=r"no server answers .*-ERR unknown command"),
    ):
        train(create_config(data_dir, tmp_path / "run", url), dry_run=True)
