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

pytestmark = pytest.mark.slow
ModelDir = Callable[..., Path]
LONG = ["--dataset", "rows.jsonl", "--batch-size", "4", "--logging-steps", "1"]


@pytest.fixture(autouse=True)
def rows(tmp_path: Path) -> None:
    lines = (f'{{"prompt": "what is {i}", "completion": "it is {i * i}"}}\n' for i in range(24))
    (tmp_path / "rows.jsonl").write_text("".join(lines))


def as_in_a_terminal() -> None:
    """Take no signal as ignored because the tests were begun by nohup or in the background."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ftlevel", *arguments], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=as_in_a_terminal,
    )  # fmt: skip


def begin(tmp_path: Path, model: Path, steps: int = 4000) -> Forked:
    """Start a run in a process that has all imports."""
    command = ["train", *LONG, "--model", str(model), "--max-steps", str(steps), "--output-dir",
               "run"]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return Forked(call=(run_slowly, (command,)), cwd=tmp_path, **pipes)


def wait_until(process: Forked, happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happens():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_run_is_ended_after_its_step(
    tmp_path: Path, tiny_model_dir: ModelDir, name: str, code: int
) -> None:
    process = begin(tmp_path, tiny_model_dir("llama"))
    wait_until(process, lambda: lines(tmp_path / "run/metrics.jsonl") >= 3)
    process.send_signal(getattr(signal, name))
    _, error = process.communicate(timeout=120)
    assert process.returncode == code
    assert "interrupted after step" in error
    assert len(list((tmp_path / "run/checkpoints").glob("checkpoint-*/manifest.json"))) == 1


def test_the_second_signal_ends_a_run_at_once_with_its_own_code(
    tmp_path: Path, tiny_model_dir: ModelDir
) -> None:
    process = begin(tmp_path, tiny_model_dir("llama"))
    wait_until(process, lambda: lines(tmp_path / "run/metrics.jsonl") >= 3)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)  # two of one kind that wait are one
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "Traceback" not in error
    assert "interrupted" in error


def test_a_warning_makes_a_checkpoint_and_the_run_goes_on(
    tmp_path: Path, tiny_model_dir: ModelDir
) -> None:
    process = begin(tmp_path, tiny_model_dir("llama"), steps=25)
    wait_until(process, lambda: lines(tmp_path / "run/metrics.jsonl") >= 3)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=240)
    assert process.returncode == 0
    manifests = (tmp_path / "run/checkpoints").glob("checkpoint-*/manifest.json")
    warned, end = sorted(int(path.parent.name.split("-")[1]) for path in manifests)
    assert 3 <= warned < end == 25


MOMENTS = {
    "a lazy import": ("exec", "arguments[0].co_filename", "transformers/modeling_utils.py"),
    "the rows": ("open", "str(arguments[0])", "rows.jsonl"),
}


@pytest.mark.parametrize(
    ("name", "code", "moment"),
    [
        ("SIGTERM", 143, "a lazy import"),
        ("SIGINT", 130, "the rows"),
        pytest.param("SIGTERM", 143, "the rows", marks=pytest.mark.sweep),
        pytest.param("SIGINT", 130, "a lazy import", marks=pytest.mark.sweep),
    ],
)
def test_a_command_that_has_written_nothing_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int, moment: str
) -> None:
    """The process sends itself the signal at a moment that its audit events tell.

    transformers makes a ModuleNotFoundError of what interrupts its lazy imports. CPython remembers
    an interrupt that has passed an exec() of text, and ends `python -m` by a signal for it.
    """
    event, place, ending = MOMENTS[moment]
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import os, signal, sys
sent = []
def watch(event, arguments):
    if not sent and event == {event!r} and {place}.endswith({ending!r}):
        sent.append(event)
        exec("os.kill(os.getpid(), signal.{name})")
sys.addaudithook(watch)
"""
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start(tmp_path, "train", *LONG, "--output-dir", "run")
    _, error = process.communicate(timeout=120)
    assert process.returncode == code
    assert error.splitlines()[-1] == "ftlevel: interrupted; nothing was saved."
    assert not (tmp_path / "run").exists()


def run_as(tmp_path: Path, lines: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a process in which `lines` were run before."""
    script = f"import os, signal, sys, time\nfrom ftlevel.cli import app\n{lines}\napp.main()\n"
    return subprocess.run(
        [sys.executable, "-c", script, "list-methods"], cwd=tmp_path, text=True, timeout=60,
        capture_output=True, preexec_fn=as_in_a_terminal, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_when_all_is_said_breaks_nothing_off(tmp_path: Path, name: str) -> None:
    ended = run_as(
        tmp_path,
        f"""import atexit
@atexit.register
def clean():
    os.kill(os.getpid(), signal.{name})
    time.sleep(0.01)
    print("deleted whole")
""",
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.endswith("deleted whole\n")


def test_the_second_signal_at_the_end_ends_it(tmp_path: Path) -> None:
    ended = run_as(
        tmp_path,
        """import atexit
@atexit.register
def clean():
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
""",
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_signal_that_comes_where_python_cannot_raise_is_not_lost(tmp_path: Path) -> None:
    ended = run_as(
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
    assert ended.returncode == 143
    assert ended.stderr == "ftlevel: interrupted; nothing was saved.\n"


def stop_at_flush(arguments: list[str]) -> None:
    """Be the program, which gets a signal when its answers are in place."""
    from ftlevel.artifacts import files
    from ftlevel.cli import app

    flush = files.flush

    def stopping(path: Path) -> None:
        flush(path)
        if path.is_dir():
            os.kill(os.getpid(), signal.SIGTERM)

    files.flush = stopping
    sys.argv = ["ftlevel", *arguments]
    app.main()


def test_answers_that_are_in_place_are_named(tmp_path: Path, tiny_model_dir: ModelDir) -> None:
    (tmp_path / "prompts.txt").write_text("say a word\n")
    arguments = ["generate", str(tiny_model_dir("llama")), "--prompts", "prompts.txt", "--out",
                 "answers.jsonl", "--max-new-tokens", "2"]  # fmt: skip
    process = Forked(call=(stop_at_flush, (arguments,)), cwd=tmp_path, stderr=subprocess.PIPE)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143, error
    assert "answers.jsonl was written before that, and is whole." in error
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1
