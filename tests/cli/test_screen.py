"""Terminal output of a run: closed pipes, names that look like markup, narrow windows."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console
from rich.text import Text

from forked import Forked
from ftlevel._version import __version__
from ftlevel.cli.app import run
from ftlevel.cli.screen import EscapingConsole, Screen
from ftlevel.cli.startup import SafeStream
from ftlevel.config.section import Choice
from run_files import ModelDir

RECORD = {"step": 7, "loss": 2.3456, "learning_rate": 1e-4, "grad_norm": 0.123, "epoch": 0.12,
          "tokens": 900, "elapsed_s": 1.0, "train_s": 1.0}  # fmt: skip


class ClosedStream(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_broken_pipe_is_reported_and_run_continues(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=SafeStream(ClosedStream()))
    console.print("one")
    console.print("two")
    message = "ftlevel: output is closed (Broken pipe); the command continues.\n"
    assert capsys.readouterr().err == message
    Console(file=SafeStream(None)).print("three")


def test_exit_if_closed_exits_for_closed_pipe() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        screen = Screen(Console(file=SafeStream(stream)), quiet=True)
        screen.exit_if_closed()
        os.close(read)
        with pytest.raises(typer.Exit) as error:
            screen.exit_if_closed()
    assert error.value.exit_code == 141
    Screen(Console(file=SafeStream(io.StringIO())), quiet=True).exit_if_closed()


def test_unencodable_characters_are_replaced() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    Console(file=SafeStream(stream)).print("loss 2 → 1")
    assert raw.getvalue() == b"loss 2 ? 1\n"


def test_a_command_has_one_title() -> None:
    file = io.StringIO()
    screen = Screen(Console(file=file), quiet=False)
    for title in ("train", "verify-fast"):
        screen.choices(title, [Choice("data", "rows.csv")])
    assert file.getvalue() == f"ftlevel {__version__} train\n" + "  data: rows.csv\n" * 2


@pytest.mark.parametrize("name", ["[red]x", "[/]", "a\\[b]"])
@pytest.mark.parametrize("terminal", [True, False])
def test_names_are_not_parsed_as_markup(name: str, terminal: bool) -> None:
    file = io.StringIO()
    screen = Screen(Console(file=file, force_terminal=terminal, no_color=True, width=90),
                    quiet=False)  # fmt: skip
    screen.choices("train", [Choice("data", name, f"of {name}"), Choice(name, 1)])
    screen.log({"step": 1, f"eval_f1 {name}": 0.5})
    screen.warn(name)
    assert file.getvalue().count(name) == 5


EVIL = "a\x1b[2Jb\x9bc\u202ed\re\x7f\udc80"
SHOWN = r"a\x1b[2Jb\x9bc\u202ed\re\x7f\udc80"


def test_console_prints_controls_as_escapes() -> None:
    file = io.StringIO()
    console = EscapingConsole(file=file, force_terminal=True, width=90)
    screen = Screen(console, quiet=False)
    screen.choices("train", [Choice("data", EVIL, EVIL), Choice(EVIL, 1)])
    screen.warn(f"{EVIL} at http://user:secret@host/x?token=secret")
    console.print(Text(EVIL), highlight=False)
    text = re.sub("\x1b\\[[0-9;]*m", "", file.getvalue())  # rich's styles
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\udc80]|secret", text)
    assert text.count(SHOWN) == 4
    assert r"\x1b[2Jb\x9bc\u202ede\x7f" in text  # a Text drops \r itself


def test_printed_text_and_json_have_no_controls(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", f"/{EVIL[:-1]}", "--dataset", "builtin:docstrings"]
    assert run(["train", *model, "--json"]) == 2
    sys.stdout.write(f"{EVIL}\n")
    out, err = capsys.readouterr()
    line, _, printed = out.partition("\n")
    assert printed == f"{SHOWN}\n"
    assert SHOWN[:-6] in err
    assert EVIL[:-1] in json.loads(line)["error"]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 200])
def test_remaining_time_is_shown_at_every_width(width: int) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, no_color=True, width=width)
    screen = Screen(console, quiet=False)
    screen.begin(12_345)
    for step in range(1, 9):
        screen.step(step)
    screen.log(RECORD)
    screen.log({**RECORD, "tokens": 123_456, "elapsed_s": 99.0, "train_s": 2.0})
    assert screen._progress is not None
    console.print(screen._progress.get_renderable())
    screen.close()
    bars = [line for line in file.getvalue().splitlines() if "8/12,345" in line]
    assert bars
    assert all(" left" in line for line in bars)
    if width >= 80:
        assert "loss 2.3456" in bars[-1]
        assert "122,556 tok/s" in bars[-1]


def test_tensors_without_gradient_are_not_counted(tmp_path: Path) -> None:
    file = io.StringIO()
    proof = {"gradient_tensors": 74, "idle_tensors": 1, "frozen_tensors": 0,
             "reload_difference": 0.0, "adapter_effect": 1.5}  # fmt: skip
    Screen(Console(file=file), quiet=False).end({
        "proof": proof, "timings": dict.fromkeys(("tokens_per_s", "total_s", "to_first_step_s"), 1),
        "loss_first": None, "metrics_before": {}, "metrics": {}, "memory": {"peak_bytes": 0},
        "run": str(tmp_path), "next": [],
    })  # fmt: skip
    assert "proof 73 of 74 trainable tensors had gradients; " in file.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_run_completes_with_full_stdout(tmp_path: Path, tiny_model_dir: ModelDir) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a b", "completion": "c d"}\n' * 3)
    with Path("/dev/full").open("w") as full:
        command = ["train", "--model", str(tiny_model_dir("llama")), "--dataset", str(data),
                   "--max-steps", "2", "--output-dir", str(tmp_path / "run")]  # fmt: skip
        process = Forked(command, stdout=full, stderr=subprocess.PIPE)
        _, err = process.communicate(timeout=120)
    message = "output is closed (No space left on device); the command continues."
    assert (process.returncode, err.strip()) == (0, f"ftlevel: {message}")
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.parametrize("arguments", [["list-targets", "llama"], ["train", "--json", "--lr", "9"]])
def test_write_error_on_stdout_prints_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert run(arguments) == (1 if "list-targets" in arguments else 2)
    assert len(capsys.readouterr().err.splitlines()) == 1
