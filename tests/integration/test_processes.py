"""Two processes take the same steps as one with twice the accumulation."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

import forked
import ranks
from forked import Forked
from ftlevel import TrainConfig, train
from ftlevel.cli import train as processes
from ftlevel.cli.app import run
from ftlevel.errors import ConfigError
from ftlevel.events import NullListener
from ftlevel.training import processes as watch_processes
from ftlevel.training.trainer import FtlevelTrainer
from run_files import ModelDir, read_losses, read_summary, write_rows

pytestmark = pytest.mark.slow
PROGRAM = [sys.executable, "-m", "ftlevel"]
ROWS = 18  # the last step of an epoch has rows for one of the processes only
TEXT = ["a", "dog", "sees", "the", "old", "house", "and", "the", "cat", "sits", "there"]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": " ".join(TEXT[: 2 + n % 5]), "completion": " ".join(TEXT[n % 6 : 8])}
        for n in range(ROWS)
    ]
    write_rows(path, lines)
    return path


def train_command(model: Path, dataset: Path, out: Path, *options: str) -> list[str]:
    return [
        "train", "--method", "lora", "--model", str(model),
        "--dataset", str(dataset), "--dtype", "float32", "--per-device-train-batch-size", "4",
        "--output-dir", str(out), *options,
    ]  # fmt: skip


Command = Callable[..., list[str]]
LONG_RUN = "--max-steps 4000 --num-processes 2 --logging-steps 1"


@pytest.fixture
def command(tiny_model_dir: ModelDir, dataset: Path, tmp_path: Path) -> Command:
    """Return a function of further options that returns the arguments of a run in `tmp_path`."""

    def build(*options: str, out: str = "run", family: str = "llama") -> list[str]:
        words = " ".join(options).split()
        return train_command(tiny_model_dir(family), dataset, tmp_path / out, *words)

    return build


def train_in_one_process(
    model: Path, dataset: Path, out: Path, steps: int, *, fast: bool, **settings: Any
) -> None:
    """Train in this process like two processes, with doubled accumulation."""
    values = TrainConfig().model_dump()
    values["method"] = {"kind": "lora"}
    values["model"] |= {"name_or_path": str(model), "dtype": "float32"}
    values["data"] |= {"dataset": str(dataset)}
    values["speed"] |= {"fast": fast}
    values["train"] |= {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": steps,
        "logging_steps": 1, **settings,
    }  # fmt: skip
    values["output"] |= {"dir": out}
    train(TrainConfig.model_validate(values))


def test_two_processes_match_doubled_accumulation(
    command: Command, tiny_model_dir: ModelDir, dataset: Path, tmp_path: Path
) -> None:
    model = tiny_model_dir("llama")
    process = subprocess.run(
        [*PROGRAM, *command("--max-steps 6 --no-fast --num-processes 2 --json", out="two")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    summary = json.loads(process.stdout)  # one object, from rank 0
    assert summary["steps"] == 6
    train_in_one_process(model, dataset, tmp_path / "one", 6, fast=False)
    counts = [
        [json.loads(line)["tokens"] for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("one", "two")
    ]
    assert counts[0] == counts[1], "of both processes"
    timings = summary["timings"]
    assert timings["tokens_per_s"] == pytest.approx(counts[1][-1] / timings["train_s"], rel=1e-2)
    one_process, two_processes = (
        load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("one", "two")
    )
    assert one_process.keys() == two_processes.keys()
    assert all(one_process[name].equal(two_processes[name]) for name in one_process)


def test_sharded_run_evaluates_and_saves(command: Command) -> None:
    """The exit code is that of all processes; each verifies its shard of the base."""
    process = forked.run(*command(
        "--max-steps 4 --shard full --validation-split 0.3 --eval-steps 2 --save-steps 2",
        "--num-processes 2 --json",
    ))  # fmt: skip
    summary = json.loads(process.stdout)
    assert summary["steps"] == 4
    assert summary["best"]["evaluations"] == 2
    assert summary["metrics"]["loss"] > 0


def test_sharded_experts_are_verified(command: Command, tmp_path: Path) -> None:
    """The saved files have a tensor for each expert, the model one for all."""
    options = "--max-steps 2 --shard full --num-processes 2 --json"
    arguments = command(options, family="mixtral")
    arguments[arguments.index("lora")] = "full"
    assert json.loads(forked.run(*arguments).stdout)["proof"]["reload_difference"] == 0
    names = load_file(tmp_path / "run/adapter/model.safetensors")
    assert any(".experts.1." in name for name in names)


def test_interrupt_saves_checkpoint_of_all_processes(
    tiny_model_dir: ModelDir, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    model = tiny_model_dir("llama")
    schedule = {"learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    options = ("--max-steps", "100000", "--num-processes", "2", "--logging-steps", "1",
               "--learning-rate", "1e-3", "--lr-scheduler-type", "constant")  # fmt: skip
    launcher = Forked(
        train_command(model, dataset, out, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 300
    metrics = out / "metrics.jsonl"
    while time.monotonic() < deadline:
        if metrics.exists() and len(metrics.read_text().splitlines()) > 1:
            break
        time.sleep(0.2)
    launcher.send_signal(signal.SIGINT)
    message = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 130, message
    assert message.count("interrupted after step") == 1
    (checkpoint,) = (out / "checkpoints").glob("checkpoint-*")
    files = {path.name for path in checkpoint.iterdir()}
    assert {"manifest.json", "rng_state_0.pth", "rng_state_1.pth"} <= files
    # The fast step packs other micro-batches in one process than in two, so rounding differs.
    # The second loss is computed after one update.
    train_in_one_process(model, dataset, tmp_path / "one", 2, fast=True, **schedule)
    assert read_losses(tmp_path / "one") == pytest.approx(read_losses(out)[:2], rel=1e-6)


def test_resumed_run_matches_uninterrupted_run(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = "--max-steps 8 --save-steps 5 --num-processes 2 --lora-dropout 0.1".split()
    arguments = command(*options)
    forked.run(*arguments)
    weights = out / "adapter/adapter_model.safetensors"
    expected = weights.read_bytes()
    shutil.rmtree(out / "adapter")
    shutil.rmtree(out / "checkpoints/checkpoint-8")  # 5 is in the middle of the second epoch
    forked.run("train", "--output-dir", str(out), "--resume")
    assert weights.read_bytes() == expected


def train_with_nan_loss(rank: int, model: Path, dataset: Path, out: Path, action: str) -> None:
    """Train with a loss that is NaN in step 6 of the second process."""
    compute_loss = FtlevelTrainer.compute_loss

    def compute(self: Any, *arguments: Any, **settings: Any) -> Any:
        loss = compute_loss(self, *arguments, **settings)
        return loss * float("nan") if rank == 1 and self.state.global_step == 5 else loss

    FtlevelTrainer.compute_loss = compute  # type: ignore[method-assign]
    values = TrainConfig().model_dump()
    values["model"]["name_or_path"], values["data"]["dataset"] = str(model), str(dataset)
    values["train"] |= {"max_steps": 8, "save_steps": 3, "on_nonfinite": action}
    values["speed"]["verify"], values["output"]["dir"] = False, out
    train(TrainConfig.model_validate(values), listener=NullListener())


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_all_processes_skip_step_with_nan_in_one(
    tiny_model_dir: ModelDir, dataset: Path, tmp_path: Path, action: str
) -> None:
    arguments = (tiny_model_dir("llama"), dataset, tmp_path / "run", action)
    both = ranks.start(train_with_nan_loss, [(rank, *arguments) for rank in (0, 1)])
    assert ranks.end(both, 120) == [0, 0]
    summary = read_summary(tmp_path / "run")
    (note,) = summary["left_out"]
    assert note["step"] == 6
    assert note["how"] == {"skip": "skipped", "rollback": "rolled back to checkpoint-3"}[action]


def test_two_processes_count_pairs_and_tokens(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    """One of the processes has no pair in the last step, whose loss has two counts."""
    rows = [{"prompt": "a", "chosen": " ".join(TEXT[:n]), "rejected": "b"} for n in range(1, 6)]
    dataset = tmp_path / "pairs.jsonl"
    write_rows(dataset, rows)
    options = ["--task", "preference", "--loss", "cpo", "--set", "preference.nll_mean=token",
               "--logging-steps", "1", "--warmup-steps", "9", "--num-train-epochs", "1",
               "--num-processes", "2"]  # fmt: skip
    model, out = tiny_model_dir("llama"), tmp_path / "run"
    command = train_command(model, dataset, out, *options)
    command[command.index("4")] = "2"
    process = forked.run(*command)
    assert process.stderr.count("--warmup-steps 9 is longer") == 1, "the first process warns"
    assert len(read_losses(out)) == 2


def test_num_processes_without_launcher_raises() -> None:
    with pytest.raises(ConfigError, match="1 process was started"):
        train(TrainConfig.model_validate({"train": {"num_processes": 2}}))


def test_two_processes_keep_best_model_and_stop_early(
    tiny_model_dir: ModelDir, dataset: Path, tmp_path: Path
) -> None:
    eval_file = tmp_path / "held.jsonl"
    eval_file.write_text("".join(dataset.read_text().splitlines(keepends=True)[:4]))
    options = ("--validation-file", str(eval_file), "--set", "data.gate.leaked=ignore",
               "--eval-steps", "2", "--metric-for-best-model", "loss", "--greater-is-better",
               "--lr-scheduler", "constant", "--max-steps", "40", "--num-processes", "2",
               "--save-strategy", "best",
               "--save-minutes", "0.000001")  # fmt: skip
    out, model = tmp_path / "run", tiny_model_dir("llama")
    arguments = train_command(
        model, dataset, out, *options, "--early-stopping-patience", "2", "--json"
    )
    process = forked.run(*arguments)
    summary = json.loads(process.stdout)
    assert summary["steps"] == 6
    assert summary["best"]["kept_step"] == 2
    assert summary["best"]["stopped_early"]
    best_weights = (out / "adapter/adapter_model.safetensors").read_bytes()
    checkpoints = {path.name for path in (out / "checkpoints").iterdir() if path.is_dir()}
    assert checkpoints == {"checkpoint-5", "checkpoint-6", "best-2"}, (
        "the clock has struck at each step"
    )
    shutil.rmtree(out / "adapter")
    shutil.rmtree(out / "checkpoints/checkpoint-6")
    forked.run("train", "--output-dir", str(out), "--resume")
    assert (out / "adapter/adapter_model.safetensors").read_bytes() == best_weights


def wait_for_processes(launcher: Forked, log: Path) -> list[psutil.Process]:
    """Returns the two processes of a run after its first steps, in order of their start times."""
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= 2):
        assert time.monotonic() < deadline
        assert launcher.poll() is None
        time.sleep(0.05)
    processes_of_run = psutil.Process(launcher.pid).children()
    return sorted(processes_of_run, key=lambda process: (process.create_time(), process.pid))


def is_alive(process: psutil.Process) -> bool:
    """Whether the process runs; a zombie does not."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process_ends_run_with_message(command: Command, tmp_path: Path, rank: int) -> None:
    launcher = Forked(
        command(LONG_RUN),
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_processes(launcher, tmp_path / "run/metrics.jsonl")[rank].kill()
    start = time.monotonic()
    _, error = launcher.communicate(timeout=60)
    assert time.monotonic() - start < 30
    assert launcher.returncode == 1
    assert f"the process of rank {rank} was killed" in error


@pytest.mark.parametrize("rank", [0, 1])
def test_kill_is_reported_if_all_processes_have_exited(
    capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    """The others may fail before the next poll, since their connection is closed."""
    ends = ["exit 1", "exit 1"]
    ends[rank] = "kill -9 $$"
    running = [subprocess.Popen(["sh", "-c", end]) for end in ends]
    for process in running:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert processes._wait(running) == 1
    assert f"the process of rank {rank} was killed" in capsys.readouterr().err


def watch_closely(arguments: Sequence[str]) -> None:
    """Run the command with a heartbeat timeout of 5 seconds, not 15."""
    watch_processes._INTERVAL, watch_processes.HEARTBEAT_TIMEOUT = 0.5, 5.0
    forked.run_slowly(arguments)


def suspend_and_resume(rank: int, model: Path, dataset: Path, folder: Path) -> str:
    """Suspend a process of a run until the run reports it; returns what the run has reported."""
    arguments = train_command(model, dataset, folder / "run", *LONG_RUN.split())
    folder.mkdir()
    stderr_file = folder / "says"
    with stderr_file.open("w") as file:
        launcher = Forked(
            call=(watch_closely, (arguments,)), stderr=file, stdout=subprocess.DEVNULL
        )
    suspended = wait_for_processes(launcher, folder / "run/metrics.jsonl")[rank]
    try:
        time.sleep(1.5)  # time for two heartbeats
        suspended.suspend()
        start = time.monotonic()
        while f"rank {rank} (" not in stderr_file.read_text():
            assert time.monotonic() - start < 30, stderr_file.read_text()
            time.sleep(0.1)
        (line,) = [
            line for line in stderr_file.read_text().splitlines() if "has not responded" in line
        ]
        assert line.startswith(f"warning: rank {rank} ({socket.gethostname()}) has not responded")
        suspended.resume()
        before = len(read_losses(folder / "run"))
        while len(read_losses(folder / "run")) < before + 3:
            assert time.monotonic() - start < 60
            time.sleep(0.1)
    finally:
        suspended.resume()
        launcher.send_signal(signal.SIGINT)
        launcher.wait(60)
    return stderr_file.read_text()


def test_suspended_process_is_reported(
    tiny_model_dir: ModelDir, dataset: Path, tmp_path: Path
) -> None:
    """Rank 0 reports it, or rank 1 if rank 0 is suspended; two runs wait at the same time."""
    model = tiny_model_dir("llama")
    with ThreadPoolExecutor() as pool:
        reports = pool.map(
            lambda rank: suspend_and_resume(rank, model, dataset, tmp_path / str(rank)), (0, 1)
        )
        assert [report.count("has not responded") for report in reports] == [1, 1]


@pytest.mark.parametrize(("event", "code", "message"), [
    pytest.param("SIGTERM", 143, "interrupted", marks=pytest.mark.sweep),
    ("SIGINT", 130, "interrupted"), ("kill rank 1", 1, "the process of rank 1 was killed"),
])  # fmt: skip
def test_signal_during_startup_ends_run_with_message(
    command: Command, event: str, code: int, message: str
) -> None:
    """Processes handle signals while they still import torch."""
    launcher = subprocess.Popen(
        [*PROGRAM, *command("--num-processes", "2")],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # `&` ignores SIGINT
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(processes_of_run := psutil.Process(launcher.pid).children()) < 2 or any(
        process.cpu_times().user < 0.5 for process in processes_of_run
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if event == "kill rank 1":
        max(processes_of_run, key=lambda process: int(process.environ()["RANK"])).kill()
    else:
        launcher.send_signal(getattr(signal, event))
    _, error = launcher.communicate(timeout=60)
    assert (launcher.returncode, "Traceback" in error) == (code, False), error
    assert message in error
    assert not any(is_alive(process) for process in processes_of_run)


def test_processes_end_with_their_launcher(command: Command, tmp_path: Path) -> None:
    launcher = Forked(
        command(LONG_RUN),
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    ranks = wait_for_processes(launcher, tmp_path / "run/metrics.jsonl")
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 30
    while alive := [rank for rank in ranks if is_alive(rank)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)
    assert list((tmp_path / "run/checkpoints").glob("checkpoint-*/manifest.json"))


@pytest.mark.parametrize(
    ("killed", "message"),
    [
        pytest.param("agent", "interrupted", marks=pytest.mark.sweep),
        ("node", "another process of the run has exited"),
    ],
)
def test_lost_node_ends_other_nodes_with_message(
    command: Command, tmp_path: Path, killed: str, message: str
) -> None:
    """If only its agent is killed, the process ends too, and all save a checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ("--max-steps", "4000", "--save-steps", "20", "--logging-steps", "1")
    run = [
        "-m",
        "ftlevel",
        *command(*options),
    ]
    nodes = []
    for node in "01":
        agent = ["--nnodes", "2", "--node-rank", node, "--nproc-per-node", "1",
                 "--master-addr", "127.0.0.1", "--master-port", port, *run]  # fmt: skip
        with (tmp_path / node).open("w") as log:
            nodes.append(Forked(call=(forked.run_torchrun, (agent,)), stdout=log, stderr=log))
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run/checkpoints").glob("checkpoint-*/manifest.json")):
        assert all(node.poll() is None for node in nodes), (tmp_path / "0").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes_of_run = psutil.Process(nodes[1].pid).children(recursive=True)
    start = time.monotonic()
    for process in (nodes[1], *(processes_of_run if killed == "node" else ())):
        process.kill()
    assert nodes[0].wait(60) == 1
    assert nodes[1].wait(60) != 0
    while any(is_alive(process) for process in processes_of_run):
        assert time.monotonic() - start < 30
        time.sleep(0.1)
    assert time.monotonic() - start < 30
    (line,) = [t for t in (tmp_path / "0").read_text().splitlines() if t.startswith("ftlevel: ")]
    assert message in line


def test_run_is_restarted_after_killed_process(
    command: Command, tiny_model_dir: ModelDir, dataset: Path, tmp_path: Path
) -> None:
    options = ("--max-steps", "10", "--num-processes", "2", "--logging-steps", "1", "--save-steps",
               "2", "--lora-dropout", "0.1")  # fmt: skip
    model, out = tiny_model_dir("llama"), tmp_path / "run"
    forked.run(*command(*options, out="whole"))
    restarted = train_command(model, dataset, out, *options, "--max-restarts", "1", "--overwrite")
    launcher = Forked(
        call=(forked.run_slowly, (restarted, 0.25)),
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_processes(launcher, out / "metrics.jsonl")[1].kill()
    _, error = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, error
    assert "restarting with --resume; 0 restarts are left" in error
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("exit_codes", "code", "launches"),
    [([1, 1, 0], 0, 3), ([1, 1, 1, 1], 1, 3), ([2], 2, 1), ([143], 143, 1), ([0], 0, 1)],
)
def test_only_failed_run_is_restarted(
    monkeypatch: pytest.MonkeyPatch, exit_codes: list[int], code: int, launches: int
) -> None:
    lines = []

    def launch_once(arguments: Sequence[str], count: int, signals: list[int]) -> int:
        lines.append(list(arguments))
        return exit_codes[len(lines) - 1]

    monkeypatch.setattr(processes, "_launch_once", launch_once)
    assert processes.launch(["train", "--output-dir", "x", "--overwrite"], 2, restarts=2) == code
    assert len(lines) == launches
    for line in lines[1:]:
        assert line[-2:] == ["--no-overwrite", "--resume"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--overwrite"],
        ["--overwrite", "true"],
        ["--overwrite=1"],
        ["--overwrite_output_dir"],
        ["--overwrite-output-dir", "True", "--resume", "false"],
        ["--set", "output.overwrite=true"],
    ],
)
def test_restart_resumes_and_does_not_overwrite(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], tmp_path: Path
) -> None:
    lines: list[list[str]] = []

    def launch_once(line: Sequence[str], count: int, signals: list[int]) -> int:
        lines.append(list(line))
        return int(len(lines) == 1)

    monkeypatch.setattr(processes, "_launch_once", launch_once)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"output: {tmp_path}\n")
    assert processes.launch(["train", str(recipe), *arguments], 2, restarts=1) == 0
    configs: list[TrainConfig] = []

    def stop(config: TrainConfig, **_: object) -> None:
        configs.append(config)
        raise ConfigError("stop")

    monkeypatch.setattr("ftlevel.commands.train.train", stop)
    assert run(lines[1]) == 2
    assert [(config.output.resume, config.output.overwrite) for config in configs] == [
        (True, False)
    ]


@pytest.mark.parametrize(
    ("signal_name", "launches"), [("SIGUSR1", 2), ("SIGTERM", 1), ("SIGINT", 1)]
)
def test_run_ended_by_signal_is_not_restarted(
    monkeypatch: pytest.MonkeyPatch, signal_name: str, launches: int
) -> None:
    lines = []

    def launch_once(arguments: Sequence[str], count: int, signals: list[int]) -> int:
        lines.append(arguments)
        signals.append(getattr(signal, signal_name))
        return 2 - len(lines)

    monkeypatch.setattr(processes, "_launch_once", launch_once)
    processes.launch(["train"], 2, restarts=1)
    assert len(lines) == launches
