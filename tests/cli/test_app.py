"""The program: commands, flag spellings, exit codes, and modules that are not imported."""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import Cli
from ftlevel.artifacts.run_directory import create_marker
from ftlevel.cli.app import commands, main, run
from ftlevel.config import SPECS, TrainConfig
from ftlevel.config.flag import config_of
from ftlevel.config.methods import MODULES

HEAVY = ("torch", "transformers", "peft", "datasets", "numpy", "accelerate")


@pytest.mark.parametrize("name", commands())
def test_command_summary_is_first_docstring_line(name: str) -> None:
    target, summary = commands()[name]
    module, _, attribute = target.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    assert (function.__doc__ or "").strip().splitlines()[0] == summary


def test_no_arguments_prints_help(cli: Cli) -> None:
    output = cli.run()
    assert output.out.startswith("Usage: ftlevel [OPTIONS] COMMAND")
    assert output.err == ""


@pytest.mark.parametrize("name", commands())
def test_every_command_has_help(name: str, cli: Cli) -> None:
    assert cli(name, "--help").startswith(f"Usage: ftlevel {name} ")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["list-targets", "llama"], ["train", "--schema"]]
)
def test_help_and_tables_import_no_heavy_library(arguments: list[str]) -> None:
    code = (
        f"import sys; from ftlevel.cli.app import run; code = run({arguments!r}); loaded = [m for "
        f"m in {HEAVY!r} if m in sys.modules]; print(loaded, file=sys.stderr); sys.exit(code)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0
    assert process.stderr.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (OSError("Can't load it"), "OSError: Can't load it. This is a bug in ftlevel: ", 1),
        (OSError(errno.ENOSPC, "No space left"), "No space left. Add --traceback to see where", 1),
        (OSError(errno.ENAMETOOLONG, "Too long", "x"), "x: Too long. Name a shorter path.", 2),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory: [Errno 12] Cannot ", 1),
    ],
)
def test_system_errors_are_messages(
    error: OSError,
    message: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("ftlevel.cli.app._call", fail)
    assert run(["list-targets", "llama", "--json"]) == code
    output = capsys.readouterr()
    assert output.err.startswith(f"ftlevel: {message}")
    assert json.loads(output.out)["error"].startswith(message)
    with pytest.raises(OSError, match=re.escape(error.args[-1 if error.filename is None else 1])):
        run(["list-targets", "llama", "--traceback"])


def test_python_dash_m_prints_version() -> None:
    command = [sys.executable, "-m", "ftlevel", "--version"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout.startswith("ftlevel ")


def test_short_version_flag(cli: Cli) -> None:
    assert cli("-V").startswith("ftlevel ")


@pytest.mark.parametrize(
    ("typed", "completions"),
    [
        ("ftlevel quan", ["quantize"]),
        ("ftlevel train --method p", ["p-tuning", "prefix", "prompt"]),
        ("ftlevel train --task text-", ["text-classification", "text-generation"]),
        ("ftlevel list-targets distil", ["distilbert"]),
        ("ftlevel train recipes/mi", ["recipes/mine.yaml"]),
        ("ftlevel evaluate ru", ["runs/tickets"]),
        ("ftlevel report runs/", ["runs/tickets"]),
        ("ftlevel train --adapter runs/t", ["runs/tickets"]),
        ("ftlevel evaluate mi", []),  # the shell completes files
        ("ftlevel train --dataset mi", []),
        ("ftlevel train --label-smoo", ["--label-smoothing-factor"]),
    ],
)
def test_shell_completion(
    typed: str,
    completions: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").write_text("method: lora\n")
    (tmp_path / "runs/notes").mkdir(parents=True)
    (tmp_path / "runs/tickets").mkdir()
    create_marker(tmp_path / "runs/tickets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("_FTLEVEL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(typed.count(" ")))
    with pytest.raises(SystemExit):
        raise SystemExit(run([]))
    assert capsys.readouterr().out.split() == completions


def test_long_flag_help_starts_on_next_line(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = cli("train --help-all").splitlines()
    (row,) = [i for i, line in enumerate(lines) if "--eval-strategy" in line]
    assert lines[row].strip() == "--eval-strategy no|steps|epoch"
    assert lines[row + 1].strip().startswith("Evaluation schedule: ")
    assert max(map(len, lines)) <= 80


def test_every_config_field_is_used() -> None:
    """A field that nothing below the configuration reads would be a flag without effect.

    `methods.updates.LinearUpdate` passes all fields of a spec to PEFT's config, which defines
    them.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    source = Path(importlib.import_module("ftlevel").__file__ or "").parent
    config_layers = {source / "cli", source / "config"}
    packages = [room for room in source.iterdir() if room.is_dir() and room not in config_layers]
    text = "\n".join(p.read_text() for room in packages for p in room.rglob("*.py"))
    text += (source / "config/train.py").read_text()
    sections = [f.annotation for f in TrainConfig.model_fields.values()]
    models = [
        *SPECS.values(),
        *(s for s in sections if hasattr(s, "model_fields")),
        *{config for name in commands() if (config := config_of(name)) not in (None, TrainConfig)},
    ]
    passed_to_peft = {
        (spec, name)
        for kind, spec in SPECS.items()
        if MODULES[kind] == "updates"
        for name in PEFT_TYPE_TO_CONFIG_MAPPING[
            spec.model_fields["kind"].default.upper()
        ]().to_dict()
    }
    text += "\n".join(
        inspect.getsource(member.fget)
        for model in models
        for name, member in vars(model).items()
        if isinstance(member, property) and f".{name}" in text and member.fget is not None
    )  # of properties that are used
    unused = [
        f"{model.__name__}.{name}"
        for model in models
        for name, info in model.model_fields.items()
        if name != "kind"
        and info.annotation is not type(None)  # a validator translates it into other fields
        and (model, name) not in passed_to_peft
        and f".{name}" not in text
        and f'"{name}"' not in text
    ]
    assert unused == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'? See: ftlevel --help"),
        (["train", "--lora-rr", "8"], "No such option: --lora-rr"),
        (["train", "--lora_r", "x"], "--lora-r: 'x' cannot be used: expected an integer."),
        (["train", "--lr=1e-4x"], "--lr: '1e-4x' cannot be used: expected a number."),
        (["compare", "--budget-steps", "3x"], "--budget-steps: '3x' cannot be used: "),
        (["list-targets", "llama", "--lora-r", "0"], "--lora-r: '0' cannot be used: input should "),
        (["evaluate", "runs/nope"], "runs/nope does not exist. Expected the directory of a run"),
        (["generate", "runs/nope", "--prompt", "x"], "runs/nope does not exist. Expected the dir"),
        (["train", "--method", "lorra"], "Did you mean 'lora'?"),
        (["train", "--task", "sumarization"], "Did you mean 'summarization'?"),
        (["train", "--quant", "4bit", "--method", "full"], "Use --method qlora"),
        (["train", "--bf16", "--dtype", "float32"], "--bf16 and --dtype both set model.dtype"),
        (["train", "a.yaml", "--recipe", "b.yaml"], "two recipes are given"),
        (["train", "--map", "summary"], "expected NAME=COLUMN"),
        (["train", "--set", "seed"], "expected section.key=value"),
        (["list-targets", "lama"], "Did you mean 'llama'"),
        (
            ["generate", "builtin:tiny-llama"],
            "no prompt. Add --prompt TEXT, --prompts FILE or --chat.",
        ),
        (
            ["generate", "nothing/here", "--prompt", "x", "--max-new-tokens", "0"],
            "max_new_tokens must be ≥ 1",
        ),
    ],
)
def test_usage_error_prints_one_line_and_exits_2(
    arguments: list[str], message: str, cli: Cli
) -> None:
    captured = cli.run(*arguments, code=2)
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.err.startswith("ftlevel: ")
    assert message in captured.err


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [3])])
def test_process_that_does_not_print_an_error_exits_last(
    rank: str, waits: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """mpirun kills all processes when one exits; so the one that prints must not be killed."""
    for name, value in (("RANK", rank), ("SIZE", "2"), ("LOCAL_RANK", rank), ("LOCAL_SIZE", "2")):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    slept: list[int] = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr("ftlevel.cli.app.install_signal_handlers", lambda _: None)
    monkeypatch.setattr("ftlevel.cli.app.protect_exit", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["ftlevel", "train", "--method", "lorra"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert slept == waits
    assert ("'lorra'" in capsys.readouterr().err) == (not waits)


def test_schema_prints_json(cli: Cli) -> None:
    assert cli.json("train --schema")["title"] == "TrainConfig"


@pytest.mark.parametrize("as_json", [True, False])
def test_ctrl_c_while_resolving_is_reported(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    import ftlevel.training.session as engine

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "resolve", interrupt)
    monkeypatch.setattr("ftlevel.artifacts.files._outputs", [])  # what other tests wrote
    output = cli.run("train", *(["--json"] if as_json else []), code=130)
    assert output.err == "ftlevel: interrupted; nothing was saved.\n"
    if as_json:
        assert json.loads(output.out) == {"error": "interrupted; nothing was saved.",
                                          "exit_code": 130}  # fmt: skip


def test_ctrl_c_while_parsing_arguments_is_reported(
    monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    """Typer alone would return 130 without a message."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ftlevel.cli.flags.FtlevelCommand.parse_args", interrupt)
    monkeypatch.setattr("ftlevel.cli.app.received_signal", lambda: signal.SIGINT)
    monkeypatch.setattr("ftlevel.artifacts.files._outputs", [])  # what other tests wrote
    assert cli.fails("train", code=130) == "ftlevel: interrupted; nothing was saved.\n"


def test_ctrl_c_while_importing_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ftlevel.cli.app
    from ftlevel.__main__ import main

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ftlevel.cli.app, "main", interrupt)
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 130
    assert capsys.readouterr().err == "ftlevel: interrupted; nothing was saved.\n"


def test_unexpected_error_names_file_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise IndexError("pop from empty list")

    monkeypatch.setattr("ftlevel.trained.resolve.get_model_dir", fail)
    error = cli.fails(f"evaluate {tmp_path}", code=1)
    assert error == (
        f"ftlevel: IndexError: pop from empty list (while reading {tmp_path}). Unless that file is "
        "damaged, this is a bug in ftlevel: please report it with the output of --traceback.\n"
    )
