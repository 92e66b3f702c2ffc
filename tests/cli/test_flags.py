"""The table of flags: what is made of a row, and what every row must have."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import typer

import cli_page
import write_docs
from additions.tree import FLAG
from additions.tree import run as run_in
from ftlevel.cli.app import build_app, commands, run
from ftlevel.cli.flags import CommandInput, add_command
from ftlevel.cli.spelling import FlagSpec, build_flag_specs, resolve_flag_aliases
from ftlevel.config import EvaluateConfig, Layer, TrainConfig
from ftlevel.config.flag import Alias, FlagAliases, UnsupportedFlag, config_of, get_field_metadata
from ftlevel.config.flags import (
    DAILY,
    DATA,
    FLAGS,
    GENERAL,
    HOW,
    MODEL,
    RUN,
    Flag,
    flags_of,
)
from ftlevel.errors import ConfigError, FtlevelError

TOY = Flag(
    "data.validation_rows",
    panel=HOW,
    aliases=FlagAliases(("--vr", Alias("--how-many", values={"some": "5"}), Alias("--few", "3"))),
)
ANSWERED = UnsupportedFlag(names="--wrapping", message="rows are packed by default. Drop it.")


def function_of(name: str) -> Callable[..., None]:
    module, _, attribute = commands()[name][0].partition(":")
    function: Callable[..., None] = getattr(importlib.import_module(module), attribute)
    return function


def layer_of(arguments: Sequence[str], flags: Sequence[Flag] = FLAGS) -> Layer:
    """Return what a command line of train sets."""
    seen = []

    def command(inputs: CommandInput) -> None:
        seen.append(inputs.layer())

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    add_command(app, "train", command, flags)
    app(args=list(arguments), standalone_mode=False)
    return seen[0]


def help_of(
    capsys: pytest.CaptureFixture[str],
    name: str,
    flags: Sequence[Flag] = FLAGS,
    asked: str = "--help-all",
) -> str:
    """Return the help of a command, whole where it has a whole one."""
    asked = asked if name in ("train", "preview") else "--help"
    build_app([name], flags)(args=[name, asked], prog_name="ftlevel", standalone_mode=False)
    return capsys.readouterr().out


def squeezed(text: str) -> str:
    """Return `text` with one space between its words."""
    return " ".join(text.split())


def panels_of(help_text: str) -> dict[str, list[str]]:
    """Return heading → the flags below it."""
    found: dict[str, list[str]] = {}
    for line in help_text.splitlines():
        if line and not line.startswith(" "):
            found[line] = []
        elif line.startswith("  -"):
            next(reversed(found.values())).append(line.split()[0])
    return found


# One row is a whole flag.


@pytest.mark.parametrize(
    ("typed", "shown", "value"),
    [
        (["--validation-rows", "7"], "--validation-rows", 7),
        (["--validation_rows=7"], "--validation-rows", 7),
        (["--vr", "7"], "--vr", 7),
        (["--how_many", "some"], "--how-many", 5),
        (["--how-many=some"], "--how-many", 5),
        (["--how-many", "7"], "--how-many", 7),
        (["--few"], "--few", 3),
        (["--few", "true"], "--few", 3),
    ],
)
def test_an_added_row_is_a_flag_by_all_its_names(
    typed: list[str], shown: str, value: object
) -> None:
    layer = layer_of(["--model", "x", *typed, "--seed", "3"], (*FLAGS, TOY))
    assert layer.values["data"] == {"validation_rows": value}
    assert layer.values["train"] == {"seed": 3}
    assert layer.locations["data", "validation_rows"] == shown
    unknown = "No such option|is no flag, but a field: --set data.validation_rows=VALUE"
    with pytest.raises((typer.TyperException, ConfigError), match=unknown):
        layer_of(typed)


def test_an_added_row_is_in_help_and_docs(capsys: pytest.CaptureFixture[str]) -> None:
    flags = (*FLAGS, TOY, ANSWERED)
    said, page = help_of(capsys, "train", flags), cli_page.command_page("train", flags)
    assert "--validation-rows" in panels_of(said)["Training:"]
    assert "Number of first streamed rows to hold out for evaluation." in squeezed(said)
    (line,) = [line for line in page.splitlines() if "--validation-rows" in line]
    assert line == (
        "| `--validation-rows` | `data.validation_rows` |  |  | `--vr`, `--how-many` "
        "(some: 5), `--few` (3) | Number of first streamed rows to hold out for evaluation. |"
    )
    assert "`--wrapping`" in page.rpartition("## Not available")[2]
    assert "--wrapping" not in said
    assert "max-generate-samples" not in help_of(capsys, "train")


def test_a_flag_is_one_line_of_one_file(tmp_path: Path) -> None:
    assert FLAG.touched == ["config/flags.py"]
    tree = FLAG.apply(tmp_path)
    assert "  --validation-rows" in run_in(tree, "train", "--help-all", cwd=tmp_path)
    said = run_in(tree, "train", "--validation-rows", "0", cwd=tmp_path, code=2)
    assert said.startswith("ftlevel: --validation-rows: 0 is out of range")


def test_two_spellings_of_one_field() -> None:
    with pytest.raises(
        ConfigError, match=r"--few and --validation-rows both set data.validation_rows"
    ):
        layer_of(["--few", "--validation-rows", "9"], (*FLAGS, TOY))
    with pytest.raises(ConfigError, match=r"--fp16 and --bf16 both set model.dtype\. Use"):
        layer_of(["--fp16", "--bf16"])


@pytest.mark.parametrize("typed", [["--wrapping"], ["--wrapping=true"], ["--wrapping", "true"]])
def test_a_flag_that_is_answered(typed: list[str]) -> None:
    with pytest.raises(FtlevelError, match=r"--wrapping.*: rows are packed by default\.") as e:
        layer_of(typed, (*FLAGS, ANSWERED))
    assert e.value.exit_code == 2


# What is made of rows of every kind.


def test_what_a_command_line_sets() -> None:
    layer = layer_of(["--dataset", "a", "--dataset", "b", "--map", "text=body", "--no-cache",
                      "--bf16", "--method", "lora", "--max-length", "64"])  # fmt: skip
    assert layer.values == {
        "data": {"dataset": "a", "also": ["b"], "columns": {"text": "body"}, "cache": False,
                 "max_length": "64"},
        "model": {"dtype": "bfloat16"},
        "method": {"kind": "lora"},
    }  # fmt: skip
    assert layer.locations["data", "columns", "text"] == "--map text"
    assert layer.locations["model", "dtype"] == "--bf16"
    assert layer.locations["data", "dataset"] == layer.locations["data", "also"] == "--dataset"


def test_nothing_given_sets_nothing() -> None:
    assert layer_of([]) == Layer()


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (["--lora_r", "8"], ["--lora-r", "8"]),
        (["--lora_r=8"], ["--lora-r=8"]),
        (["--model_name_or_path"], ["--model"]),
        (["--task_type=text_generation"], ["--task=text_generation"]),
        (["--quantization_type"], ["--quant"]),
        (["--dataset-name"], ["--dataset"]),
        (["--batch_size"], ["--batch-size"]),  # not a flag of this command: left as it is
        (["lora_r"], ["lora_r"]),
        (["--"], ["--"]),
    ],
)
def test_second_spellings(typed: list[str], read: list[str]) -> None:
    known = {"--lora-r", "--model", "--task", "--quant", "--dataset"}
    rows = [row for row in FLAGS if row.name in known]
    assert resolve_flag_aliases(typed, build_flag_specs("train", rows)).args == read


def test_words_are_translated_for_their_flag_alone() -> None:
    specs = {"--lora-target": FlagSpec("--target-modules", values={"all": "all-linear"})}
    typed = ["--lora-target", "all", "all", "--lora-target", "--x", "all"]
    read = ["--target-modules", "all-linear", "all", "--target-modules", "--x", "all"]
    assert resolve_flag_aliases(typed, specs).args == read


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["evaluate", ""], "RUN|ADAPTER|MODEL: '' cannot be used for name"),
        (["quantize", "x", "--quant", "4bit"], "--out is missing: Output directory"),
        (["evaluate", "x", "--map", "text"], "--map text: expected NAME=COLUMN, as in summary="),
        (["merge", "x"], "Missing option '--out' / '-o'."),
    ],
)
def test_errors_name_what_was_typed(
    arguments: list[str], start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    assert capsys.readouterr().err.startswith(f"ftlevel: {start}")


# Help.


def test_the_panels_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    panels = panels_of(help_of(capsys, "train"))
    headings = [f"{panel}:" for panel in (DAILY, MODEL, DATA, HOW, RUN, GENERAL)]
    assert list(panels)[1:] == ["Arguments:", *headings]
    assert panels[f"{DAILY}:"] == [
        "--model", "--dataset", "--task", "--method", "--quant", "--lora-r", "--num-train-epochs",
        "--learning-rate", "--per-device-train-batch-size", "-o,",
    ]  # fmt: skip
    assert panels[f"{GENERAL}:"] == [
        "--json", "-q,", "--help-all", "--schema", "--traceback", "-h,",
    ]  # fmt: skip
    assert sum(map(len, panels.values())) == sum(
        not row.is_argument for row in flags_of("train")
    ) + len(["--help"])


def test_the_help_of_train_is_the_flags_of_every_day(capsys: pytest.CaptureFixture[str]) -> None:
    whole = panels_of(help_of(capsys, "train"))
    said = help_of(capsys, "train", asked="--help")
    panels = panels_of(said)
    daily, others = f"{DAILY}:", list(panels)[-1]
    assert panels[daily] == whole[daily]
    assert panels[others] == ["--recipe", "--set", "--dry-run", "--help-all", "-h,"]
    hidden = sum(map(len, whole.values())) - sum(map(len, panels.values()))
    assert others == f"{hidden} more options: {MODEL}, {DATA}, {HOW}, {RUN}:"
    assert len(said.splitlines()) < 60


@pytest.mark.parametrize(
    "line",
    [
        "--quant none|4bit|8bit ",  # choices that are short stand for the value
        "[error, drop, truncate, truncate-prompt, split; default:",  # others in brackets
        "[default: 3]",
        "[default: 8 with lora]",
        "[default: builtin:tiny-llama]",
        "encoded rows of a large dataset. [default: on]",
    ],
)
def test_choices_and_defaults_are_shown(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert line in " ".join(help_of(capsys, "train").split())


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("name", commands())
def test_help_stays_within_the_window(
    name: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    longest = max(map(len, help_of(capsys, name).splitlines()))
    assert longest <= max(min(columns, 80), 60)


# What every row must have.


@pytest.mark.parametrize("name", commands())
def test_a_command_has_a_handful_of_parameters(name: str) -> None:
    function = function_of(name)
    reads = inspect.signature(function).parameters
    assert len(reads) <= 6
    own = {row.parameter for row in flags_of(name)}
    assert set(reads) <= own | {"inputs"}


@pytest.mark.parametrize("name", commands())
def test_every_flag_reaches_a_field_that_is_described(name: str) -> None:
    rows = flags_of(name)
    assert len(rows) >= 3
    for row in rows:
        metadata, config = row.metadata(name), config_of(name)
        assert metadata.description, row
        if row.rest:
            assert get_field_metadata(config or TrainConfig, row.rest).description
        if config and row.path and get_field_metadata(config, row.path).type == list[str]:
            assert metadata.example, row
            assert row.metavar, row


@pytest.mark.parametrize("name", commands())
def test_every_other_flag_is_read(name: str) -> None:
    """A flag that sets no field is a parameter of its command, or read by name."""
    cli = Path(importlib.import_module("ftlevel.cli").__file__ or "").parent
    paths = (*cli.rglob("*.py"), *(cli.parent / "extras").rglob("cli.py"))
    text = "\n".join(path.read_text() for path in paths)
    reads = inspect.signature(function_of(name)).parameters
    idle = [
        row.name
        for row in flags_of(name)
        if not row.path
        and row.parameter not in reads
        and f'["{row.parameter}"]' not in text
        and f'"{row.name}" in ar' not in text
    ]
    assert idle == []


@pytest.mark.parametrize("name", commands())
def test_names_are_given_once(name: str) -> None:
    rows = flags_of(name)
    words = [word for row in rows for word in row.typer_names(is_switch=True)]
    names = [name for word in words for name in word.split("/")]
    parameters = [row.parameter for row in rows]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert len(parameters) == len(set(parameters))
    seconds = [other.name for row in FLAGS if row.name in names for other in row.alias_names] + [
        row.name for row in FLAGS if isinstance(row, UnsupportedFlag) and name in row.on
    ]
    assert [second for second, count in Counter(seconds).items() if count > 1] == []
    assert set(seconds) & set(names) <= {"--adapter", "--base"}  # flags of generate, of evaluate


def test_rows_name_commands_and_flags_that_exist() -> None:
    shown = {row.name for row in FLAGS}
    assert {name for row in FLAGS for name in row.on} == set(commands())
    assert {"--model", "--lora-r", "--quant"} <= shown
    with pytest.raises(KeyError, match="gone"):
        Flag("train.gone").metadata("train")


def test_metadata_of_a_field() -> None:
    mapping = get_field_metadata(EvaluateConfig, "columns")
    assert (mapping.type, mapping.default, mapping.required) == (list[str], "", False)
    kind = get_field_metadata(TrainConfig, "method.kind")
    assert (kind.default, kind.description) == ("lora", "Fine-tuning method.")
    assert {"lora", "full", "p-tuning"} <= set(kind.choices)
    assert get_field_metadata(TrainConfig, "data.max_length").choices == ()  # a number, or auto
    assert get_field_metadata(TrainConfig, "speed.parallel_workers").type is str
    assert get_field_metadata(TrainConfig, "train.save_total_limit").type is int
    assert get_field_metadata(EvaluateConfig, "name").required


def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert write_docs.main(["cli", "--check"]) == 0, capsys.readouterr().out


def test_the_table_needs_no_typer() -> None:
    code = "import sys, ftlevel.config.flags; assert not {'typer', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
