"""Two processes take the same steps as one with twice the accumulation."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

import forked
from forked import Forked
from ftlevel import TrainConfig, train
from ftlevel.cli import train as processes
from ftlevel.errors import ConfigError

pytestmark = pytest.mark.slow
PROGRAM = [sys.executable, "-m", "ftlevel"]
ROWS = 18  # the last step of an epoch has rows for one of the processes only
TEXT = ["a", "dog", "sees", "the", "old", "house", "and", "the", "cat", "sits", "there"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": " ".join(TEXT[: 2 + n % 5]), "completion": " ".join(TEXT[n % 6 : 8])}
        for n in range(ROWS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(model: Path, rows: Path, out: Path, *more: str) -> list[str]:
    return [
        "train", "--method", "lora", "--model", str(model),
        "--dataset", str(rows), "--dtype", "float32", "--per-device-train-batch-size", "4",
        "--output-dir", str(out), *more,
    ]  # fmt: skip


def train_alone(
    model: Path, rows: Path, out: Path, steps: int, *, fast: bool, **settings: Any
) -> None:
    """Train in this process what two would, with twice the accumulation."""
    values = TrainConfig().model_dump()
    values["method"] = {"kind": "lora"}
    values["model"] |= {"name_or_path": str(model), "dtype": "float32"}
    values["data"] |= {"dataset": str(rows)}
    values["speed"] |= {"fast": fast}
    values["train"] |= {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": steps,
        "logging_steps": 1, **settings,
    }  # fmt: skip
    values["output"] |= {"dir": out}
    train(TrainConfig.model_validate(values))


def losses(out: Path) -> list[float]:
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def test_two_processes_are_one_with_twice_the_accumulation(
    tiny_model_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    model = tiny_model_dir("llama")
    done = subprocess.run(
        [*PROGRAM, *command(model, rows, tmp_path / "two", "--max-steps", "6", "--no-fast",
                            "--num-processes", "2", "--json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)  # one object, of the first process
    assert summary["steps"] == 6
    train_alone(model, rows, tmp_path / "one", 6, fast=False)
    one, two = (
        load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)


def test_a_sharded_run_evaluates_saves_and_ends(
    tiny_model_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    """The exit code is of all processes, each of which proves its part of the base."""
    done = forked.run(
        *command(tiny_model_dir("llama"), rows, tmp_path / "run", "--max-steps", "4", "--shard",
                 "full", "--validation-split", "0.3", "--eval-steps", "2", "--save-steps", "2",
                 "--num-processes", "2", "--json"),
    )  # fmt: skip
    summary = json.loads(done.stdout)
    assert summary["steps"] == 4
    assert summary["best"]["evaluations"] == 2
    assert summary["metrics"]["loss"] > 0


def test_ctrl_c_keeps_a_checkpoint_of_all_processes(
    tiny_model_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    model = tiny_model_dir("llama")
    rate = {"learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    more = ("--max-steps", "100000", "--num-processes", "2", "--logging-steps", "1",
            "--learning-rate", "1e-3", "--lr-scheduler-type", "constant")  # fmt: skip
    running = Forked(
        command(model, rows, out, *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 300
    metrics = out / "metrics.jsonl"
    while time.monotonic() < deadline:
        if metrics.exists() and len(metrics.read_text().splitlines()) > 1:
            break
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=120)[0]
    assert running.returncode == 130, said
    assert said.count("interrupted after step") == 1
    (kept,) = (out / "checkpoints").glob("checkpoint-*")
    held = {path.name for path in kept.iterdir()}
    assert {"manifest.json", "rng_state_0.pth", "rng_state_1.pth"} <= held
    # On the fast step one process packs other micro-batches than two do, and so adds in another
    # order. The second loss is that after an update.
    train_alone(model, rows, tmp_path / "one", 2, fast=True, **rate)
    assert losses(tmp_path / "one") == pytest.approx(losses(out)[:2], rel=1e-6)


def test_a_resumed_run_is_the_unbroken_one(
    tiny_model_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    more = (
        "--max-steps",
        "8",
        "--save-steps",
        "5",
        "--num-processes",
        "2",
        "--lora-dropout",
        "0.1",
        "--streaming",  # of which each process encodes its part
        "--set",
        "data.shuffle_buffer=5",
    )
    start = command(tiny_model_dir("llama"), rows, out, *more)
    forked.run(*start)
    weights = out / "adapter/adapter_model.safetensors"
    whole = weights.read_bytes()
    shutil.rmtree(out / "adapter")
    shutil.rmtree(out / "checkpoints/checkpoint-8")  # 5 is in the middle of the second epoch
    forked.run("train", "--output-dir", str(out), "--resume")
    assert weights.read_bytes() == whole


def test_processes_that_nobody_started_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 process was started"):
        train(TrainConfig.model_validate({"train": {"num_processes": 2}}))


def test_two_processes_keep_the_best_and_stop_together(
    tiny_model_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("".join(rows.read_text().splitlines(keepends=True)[:4]))
    more = ("--validation-file", str(held), "--set", "data.gate.leaked=ignore", "--eval-steps", "2",
            "--metric-for-best-model", "loss", "--greater-is-better", "--lr-scheduler", "constant",
            "--max-steps", "40", "--num-processes", "2", "--save-strategy", "best",
            "--save-minutes", "0.000001")  # fmt: skip
    out, model = tmp_path / "run", tiny_model_dir("llama")
    patient = command(model, rows, out, *more, "--early-stopping-patience", "2", "--json")
    done = forked.run(*patient)
    summary = json.loads(done.stdout)
    assert summary["steps"] == 6
    assert summary["best"]["kept_step"] == 2
    assert summary["best"]["stopped_early"]
    kept = (out / "adapter/adapter_model.safetensors").read_bytes()
    whole = {path.name for path in (out / "checkpoints").iterdir() if path.is_dir()}
    assert whole == {"checkpoint-5", "checkpoint-6", "best-2"}, "the clock has struck at each step"
    shutil.rmtree(out / "adapter")
    shutil.rmtree(out / "checkpoints/checkpoint-6")
    forked.run("train", "--output-dir", str(out), "--resume")
    assert (out / "adapter/adapter_model.safetensors").read_bytes() == kept


def started(launcher: Forked, log: Path) -> list[psutil.Process]:
    """Returns the two processes of a run that has made some steps, in the order of their starts."""
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= 2):
        assert time.monotonic() < deadline
        assert launcher.poll() is None
        time.sleep(0.05)
    found = psutil.Process(launcher.pid).children()
    return sorted(found, key=lambda process: (process.create_time(), process.pid))


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended may still wait to be asked how."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_in_a_line(
    tiny_model_dir: Callable[..., Path], rows: Path, tmp_path: Path, rank: int
) -> None:
    long = ("--max-steps", "4000", "--num-processes", "2", "--logging-steps", "1")
    launcher = Forked(
        command(tiny_model_dir("llama"), rows, tmp_path / "run", *long),
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    started(launcher, tmp_path / "run/metrics.jsonl")[rank].kill()
    began = time.monotonic()
    _, error = launcher.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert launcher.returncode == 1
    assert f"the process of rank {rank} was killed" in error


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_stands_still_is_named_while_the_others_wait(
    tiny_model_dir: Callable[..., Path], rows: Path, tmp_path: Path, rank: int
) -> None:
    """By the first process; where that is the one, by the second."""
    long = ("--max-steps", "4000", "--num-processes", "2", "--logging-steps", "1")
    says = tmp_path / "says"
    with says.open("w") as file:
        launcher = Forked(
            command(tiny_model_dir("llama"), rows, tmp_path / "run", *long),
            stderr=file, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    one = started(launcher, tmp_path / "run/metrics.jsonl")[rank]
    try:
        time.sleep(4)  # two signs are given
        one.suspend()
        began = time.monotonic()
        while f"rank {rank} (" not in says.read_text():
            assert time.monotonic() - began < 30, says.read_text()
            time.sleep(0.1)
        (line,) = [line for line in says.read_text().splitlines() if "has not responded" in line]
        assert line.startswith(f"warning: rank {rank} ({socket.gethostname()}) has not responded")
        one.resume()
        before = len(losses(tmp_path / "run"))
        while len(losses(tmp_path / "run")) < before + 3:
            assert time.monotonic() - began < 60
            time.sleep(0.1)
    finally:
        one.resume()
        launcher.send_signal(signal.SIGINT)
        launcher.wait(60)
    assert says.read_text().count("has not responded") == 1


@pytest.mark.parametrize(("what", "code", "said"), [
    pytest.param("SIGTERM", 143, "interrupted", marks=pytest.mark.sweep),
    ("SIGINT", 130, "interrupted"), ("a rank", 1, "the process of rank 1 was killed"),
])  # fmt: skip
def test_what_ends_before_there_is_a_run_says_so(
    tiny_model_dir: Callable[..., Path], rows: Path, tmp_path: Path, what: str, code: int, said: str
) -> None:
    """The processes import torch for seconds, and take signals from their first lines on."""
    launcher = subprocess.Popen(
        [*PROGRAM, *command(tiny_model_dir("llama"), rows, tmp_path / "run",
                            "--num-processes", "2")],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # though begun by `&`
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(found := psutil.Process(launcher.pid).children()) < 2 or any(
        process.cpu_times().user < 0.5 for process in found
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if what == "a rank":
        max(found, key=lambda process: int(process.environ()["RANK"])).kill()
    else:
        launcher.send_signal(getattr(signal, what))
    _, error = launcher.communicate(timeout=60)
    assert (launcher.returncode, "Traceback" in error) == (code, False), error
    assert said in error
    assert not any(is_alive(process) for process in found)


def test_no_process_outlives_its_launcher(
    tiny_model_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    long = ("--max-steps", "4000", "--num-processes", "2", "--logging-steps", "1")
    launcher = Forked(
        command(tiny_model_dir("llama"), rows, tmp_path / "run", *long),
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    ranks = started(launcher, tmp_path / "run/metrics.jsonl")
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 30
    while alive := [rank for rank in ranks if is_alive(rank)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)
    assert list((tmp_path / "run/checkpoints").glob("checkpoint-*/manifest.json"))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        pytest.param("agent", "interrupted", marks=pytest.mark.sweep),
        ("node", "another process of the run has exited"),
    ],
)
def test_a_lost_node_ends_the_others_in_a_line(
    tiny_model_dir: Callable[..., Path], rows: Path, tmp_path: Path, parts: str, said: str
) -> None:
    """Where its agent alone is gone, its process goes with it, and all keep a checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    long = ("--max-steps", "4000", "--save-steps", "20", "--logging-steps", "1")
    run = ["-m", "ftlevel", *command(tiny_model_dir("llama"), rows, tmp_path / "run", *long)]
    nodes = []
    for node in "01":
        agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank",
                 node, "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port",
                 port, *run]  # fmt: skip
        with (tmp_path / node).open("w") as says:
            nodes.append(subprocess.Popen(agent, stdout=says, stderr=says))
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run/checkpoints").glob("checkpoint-*/manifest.json")):
        assert all(node.poll() is None for node in nodes), (tmp_path / "0").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = psutil.Process(nodes[1].pid).children(recursive=True)
    began = time.monotonic()
    for process in (nodes[1], *(found if parts == "node" else ())):
        process.kill()
    assert nodes[0].wait(60) == 1
    assert nodes[1].wait(60) != 0
    while any(is_alive(process) for process in found):
        assert time.monotonic() - began < 30
        time.sleep(0.1)
    assert time.monotonic() - began < 30
    (line,) = [t for t in (tmp_path / "0").read_text().splitlines() if t.startswith("ftlevel: ")]
    assert said in line


def test_a_run_whose_process_was_killed_is_started_again(
    tiny_model_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    more = ("--max-steps", "30", "--num-processes", "2", "--logging-steps", "1", "--save-steps",
            "2", "--lora-dropout", "0.1")  # fmt: skip
    model, out = tiny_model_dir("llama"), tmp_path / "run"
    forked.run(*command(model, rows, tmp_path / "whole", *more))
    launcher = Forked(
        command(model, rows, out, *more, "--max-restarts", "1", "--overwrite"),
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    started(launcher, out / "metrics.jsonl")[1].kill()
    _, error = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, error
    assert "it is started again with --resume; 0 restarts are left" in error
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("given", "code", "starts"),
    [([1, 1, 0], 0, 3), ([1, 1, 1, 1], 1, 3), ([2], 2, 1), ([143], 143, 1), ([0], 0, 1)],
)
def test_only_a_run_that_failed_is_started_again(
    monkeypatch: pytest.MonkeyPatch, given: list[int], code: int, starts: int
) -> None:
    lines = []

    def once(arguments: Sequence[str], count: int, told: list[int]) -> int:
        lines.append(list(arguments))
        return given[len(lines) - 1]

    monkeypatch.setattr(processes, "_launch_once", once)
    assert processes.launch(["train", "--output-dir", "x", "--overwrite"], 2, restarts=2) == code
    assert len(lines) == starts
    assert all(line == ["train", "--output-dir", "x", "--resume"] for line in lines[1:])


@pytest.mark.parametrize(("number", "starts"), [("SIGUSR1", 2), ("SIGTERM", 1), ("SIGINT", 1)])
def test_a_run_that_was_told_to_end_is_not_started_again(
    monkeypatch: pytest.MonkeyPatch, number: str, starts: int
) -> None:
    lines = []

    def once(arguments: Sequence[str], count: int, told: list[int]) -> int:
        lines.append(arguments)
        told.append(getattr(signal, number))
        return 2 - len(lines)

    monkeypatch.setattr(processes, "_launch_once", once)
    processes.launch(["train"], 2, restarts=1)
    assert len(lines) == starts
