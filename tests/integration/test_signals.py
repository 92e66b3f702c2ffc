"""Signals end a command with one message and the conventional exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from forked import Forked, run_slowly
from run_files import ModelDir

pytestmark = pytest.mark.slow
DATA_OPTIONS = ["--dataset", "rows.jsonl", "--batch-size", "4", "--logging-steps", "1"]


@pytest.fixture(autouse=True)
def rows_file(tmp_path: Path) -> None:
    lines = (f'{{"prompt": "what is {i}", "completion": "it is {i * i}"}}\n' for i in range(24))
    (tmp_path / "rows.jsonl").write_text("".join(lines))


def reset_signals() -> None:
    """Reset signal handlers, which may be ignored under nohup or in the background."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def start_command(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ftlevel", *arguments], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=reset_signals,
    )  # fmt: skip


def start_training(tmp_path: Path, model: Path, steps: int = 4000) -> Forked:
    """Start a run in a process that has all imports."""
    command = ["train", *DATA_OPTIONS, "--model", str(model), "--max-steps", str(steps),
               "--output-dir",
               "run"]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return Forked(call=(run_slowly, (command,)), cwd=tmp_path, **pipes)


def wait_until(process: Forked, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_signal_ends_run_after_current_step(
    tmp_path: Path, tiny_model_dir: ModelDir, name: str, code: int
) -> None:
    process = start_training(tmp_path, tiny_model_dir("llama"))
    wait_until(process, lambda: count_lines(tmp_path / "run/metrics.jsonl") >= 3)
    process.send_signal(getattr(signal, name))
    _, error = process.communicate(timeout=120)
    assert process.returncode == code
    assert "interrupted after step" in error
    assert len(list((tmp_path / "run/checkpoints").glob("checkpoint-*/manifest.json"))) == 1


def test_second_signal_ends_run_immediately(tmp_path: Path, tiny_model_dir: ModelDir) -> None:
    process = start_training(tmp_path, tiny_model_dir("llama"))
    wait_until(process, lambda: count_lines(tmp_path / "run/metrics.jsonl") >= 3)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)  # pending signals of one kind are merged
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "Traceback" not in error
    assert "interrupted" in error


def test_sigusr1_saves_checkpoint_and_continues(tmp_path: Path, tiny_model_dir: ModelDir) -> None:
    process = start_training(tmp_path, tiny_model_dir("llama"), steps=15)
    wait_until(process, lambda: count_lines(tmp_path / "run/metrics.jsonl") >= 3)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=240)
    assert process.returncode == 0
    manifests = (tmp_path / "run/checkpoints").glob("checkpoint-*/manifest.json")
    warning_step, last_step = sorted(int(path.parent.name.split("-")[1]) for path in manifests)
    assert 3 <= warning_step < last_step == 15


EVENTS = {
    "lazy import": ("exec", "arguments[0].co_filename", "transformers/modeling_utils.py"),
    "rows file": ("open", "str(arguments[0])", "rows.jsonl"),
}


@pytest.mark.parametrize(
    ("name", "code", "event_name"),
    [
        ("SIGTERM", 143, "lazy import"),
        ("SIGINT", 130, "rows file"),
        pytest.param("SIGTERM", 143, "rows file", marks=pytest.mark.sweep),
        pytest.param("SIGINT", 130, "lazy import", marks=pytest.mark.sweep),
    ],
)
def test_signal_before_first_output_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int, event_name: str
) -> None:
    """The process sends itself the signal at an audit event.

    transformers turns exceptions in lazy imports into ModuleNotFoundError. CPython remembers an
    interrupt inside exec() of a string and then ends `python -m` by a signal.
    """
    event, expression, suffix = EVENTS[event_name]
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import os, signal, sys
sent = []
def watch(event, arguments):
    if not sent and event == {event!r} and {expression}.endswith({suffix!r}):
        sent.append(event)
        exec("os.kill(os.getpid(), signal.{name})")
sys.addaudithook(watch)
"""
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start_command(tmp_path, "train", *DATA_OPTIONS, "--output-dir", "run")
    _, error = process.communicate(timeout=120)
    assert process.returncode == code
    assert error.splitlines()[-1] == "ftlevel: interrupted; nothing was saved."
    assert not (tmp_path / "run").exists()


def run_with_prelude(tmp_path: Path, prelude: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process after executing `prelude`."""
    script = f"import os, signal, sys, time\nfrom ftlevel.cli import app\n{prelude}\napp.main()\n"
    return subprocess.run(
        [sys.executable, "-c", script, "list-methods"], cwd=tmp_path, text=True, timeout=60,
        capture_output=True, preexec_fn=reset_signals, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_at_exit_is_ignored(tmp_path: Path, name: str) -> None:
    process = run_with_prelude(
        tmp_path,
        f"""import atexit
@atexit.register
def clean():
    os.kill(os.getpid(), signal.{name})
    time.sleep(0.01)
    print("deleted whole")
""",
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.endswith("deleted whole\n")


def test_second_signal_at_exit_ends_process(tmp_path: Path) -> None:
    process = run_with_prelude(
        tmp_path,
        """import atexit
@atexit.register
def clean():
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
""",
    )
    assert (process.returncode, process.stderr) == (0, "")


def test_signal_in_finalizer_is_not_lost(tmp_path: Path) -> None:
    process = run_with_prelude(
        tmp_path,
        """class Folder:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

def call(*_):
    Folder()
    time.sleep(30)
    return 0

app._call = call
""",
    )
    assert process.returncode == 143
    assert process.stderr == "ftlevel: interrupted; nothing was saved.\n"


def run_and_signal_at_flush(arguments: list[str]) -> None:
    """Run the command line and send it a signal when its output file is in place."""
    from ftlevel.artifacts import files
    from ftlevel.cli import app

    original_flush = files.flush

    def flush_and_signal(path: Path) -> None:
        original_flush(path)
        if path.is_dir():
            os.kill(os.getpid(), signal.SIGTERM)

    files.flush = flush_and_signal
    sys.argv = ["ftlevel", *arguments]
    app.main()


def test_written_output_is_reported_on_signal(tmp_path: Path, tiny_model_dir: ModelDir) -> None:
    (tmp_path / "prompts.txt").write_text("say a word\n")
    arguments = ["generate", str(tiny_model_dir("llama")), "--prompts", "prompts.txt", "--out",
                 "answers.jsonl", "--max-new-tokens", "2"]  # fmt: skip
    process = Forked(
        call=(run_and_signal_at_flush, (arguments,)), cwd=tmp_path, stderr=subprocess.PIPE
    )
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143, error
    assert "answers.jsonl was written before and is complete." in error
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1
