"""The flag table: how a row becomes a flag, and the properties that every row needs."""

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
from command_line import Cli
from ftlevel.artifacts.run_directory import open_run
from ftlevel.cli.app import build_app, commands
from ftlevel.cli.flags import CommandInput, _get_adapter_task, add_command
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
    "train.max_generate_samples",
    panel=HOW,
    aliases=FlagAliases(("--vr", Alias("--how-many", values={"some": "5"}), Alias("--few", "3"))),
)
UNSUPPORTED = UnsupportedFlag(names="--wrapping", message="rows are packed by default. Drop it.")


def get_function(name: str) -> Callable[..., None]:
    module, _, attribute = commands()[name][0].partition(":")
    function: Callable[..., None] = getattr(importlib.import_module(module), attribute)
    return function


def parse_layer(arguments: Sequence[str], flags: Sequence[Flag] = FLAGS) -> Layer:
    """Return the configuration layer that a command line of train sets."""
    layers = []

    def command(inputs: CommandInput) -> None:
        layers.append(inputs.layer())

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    add_command(app, "train", command, flags)
    app(args=list(arguments), standalone_mode=False)
    return layers[0]


def get_help(
    capsys: pytest.CaptureFixture[str],
    name: str,
    flags: Sequence[Flag] = FLAGS,
    help_flag: str = "--help-all",
) -> str:
    """Return the help of a command, by default its full help if it has one."""
    help_flag = help_flag if name in ("train", "preview") else "--help"
    build_app([name], flags)(args=[name, help_flag], prog_name="ftlevel", standalone_mode=False)
    return capsys.readouterr().out


def normalize_spaces(text: str) -> str:
    """Return `text` with single spaces between words."""
    return " ".join(text.split())


def parse_panels(help_text: str) -> dict[str, list[str]]:
    """Return a dict from heading to the flags below it."""
    panels: dict[str, list[str]] = {}
    for line in help_text.splitlines():
        if line and not line.startswith(" "):
            panels[line] = []
        elif line.startswith("  -"):
            next(reversed(panels.values())).append(line.split()[0])
    return panels


# One row defines a whole flag.


@pytest.mark.parametrize(
    ("typed", "location", "value"),
    [
        (["--max-generate-samples", "7"], "--max-generate-samples", 7),
        (["--max_generate_samples=7"], "--max-generate-samples", 7),
        (["--vr", "7"], "--vr", 7),
        (["--how_many", "some"], "--how-many", 5),
        (["--how-many=some"], "--how-many", 5),
        (["--how-many", "7"], "--how-many", 7),
        (["--few"], "--few", 3),
        (["--few", "true"], "--few", 3),
    ],
)
def test_added_row_accepts_all_its_names(typed: list[str], location: str, value: object) -> None:
    layer = parse_layer(["--model", "x", *typed, "--seed", "3"], (*FLAGS, TOY))
    assert layer.values["train"] == {"max_generate_samples": value, "seed": 3}
    assert layer.locations["train", "max_generate_samples"] == location
    unknown = "No such option|is a field, not a flag: --set train.max_generate_samples=VALUE"
    with pytest.raises((typer.TyperException, ConfigError), match=unknown):
        parse_layer(typed)


def test_added_row_appears_in_help_and_docs(capsys: pytest.CaptureFixture[str]) -> None:
    flags = (*FLAGS, TOY, UNSUPPORTED)
    output, page = get_help(capsys, "train", flags), cli_page.command_page("train", flags)
    assert "--max-generate-samples" in parse_panels(output)["Training:"]
    help_text = "Number of validation rows to generate text for, for metrics."
    assert help_text in normalize_spaces(output)
    (line,) = [line for line in page.splitlines() if "--max-generate-samples" in line]
    assert line == (
        f"- `--max-generate-samples` (`train.max_generate_samples`): {help_text} Default: 32. "
        "Also `--vr`, `--how-many` (some: 5), `--few` (3)."
    )
    assert "`--wrapping`" in page.rpartition("## Not available")[2]
    assert "--wrapping" not in output
    assert "max-generate-samples" not in get_help(capsys, "train")


def test_adding_a_flag_touches_one_file(tmp_path: Path) -> None:
    assert FLAG.touched == ["config/flags.py"]
    tree = FLAG.apply(tmp_path)
    assert "  --max-generate-samples" in run_in(tree, "train", "--help-all", cwd=tmp_path)
    output = run_in(tree, "train", "--max-generate-samples", "0", cwd=tmp_path, code=2)
    assert output.startswith("ftlevel: --max-generate-samples: 0 is out of range")


def test_two_flags_for_one_field_raise() -> None:
    with pytest.raises(
        ConfigError, match=r"--few and --max-generate-samples both set train.max_generate_samples"
    ):
        parse_layer(["--few", "--max-generate-samples", "9"], (*FLAGS, TOY))
    with pytest.raises(ConfigError, match=r"--fp16 and --bf16 both set model.dtype\. Use"):
        parse_layer(["--fp16", "--bf16"])


@pytest.mark.parametrize("typed", [["--wrapping"], ["--wrapping=true"], ["--wrapping", "true"]])
def test_unsupported_flag_raises_with_explanation(typed: list[str]) -> None:
    with pytest.raises(FtlevelError, match=r"--wrapping.*: rows are packed by default\.") as e:
        parse_layer(typed, (*FLAGS, UNSUPPORTED))
    assert e.value.exit_code == 2


# The layer built from rows of every kind.


def test_command_line_sets_fields_and_locations() -> None:
    layer = parse_layer(["--dataset", "a", "--dataset", "b", "--map", "text=body", "--no-cache",
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


def test_empty_command_line_sets_nothing() -> None:
    assert parse_layer([]) == Layer()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["--lora_r", "8"], ["--lora-r", "8"]),
        (["--lora_r=8"], ["--lora-r=8"]),
        (["--model_name_or_path"], ["--model"]),
        (["--task_type=text_generation"], ["--task=text_generation"]),
        (["--quantization_type"], ["--quant"]),
        (["--dataset-name"], ["--dataset"]),
        (["--batch_size"], ["--batch-size"]),  # not a flag of this command: unchanged
        (["lora_r"], ["lora_r"]),
        (["--"], ["--"]),
    ],
)
def test_aliases_resolve_to_flag_names(typed: list[str], expected: list[str]) -> None:
    names = {"--lora-r", "--model", "--task", "--quant", "--dataset"}
    rows = [row for row in FLAGS if row.name in names]
    assert resolve_flag_aliases(typed, build_flag_specs("train", rows)).args == expected


def test_alias_values_are_translated_for_their_flag_only() -> None:
    specs = {"--lora-target": FlagSpec("--target-modules", values={"all": "all-linear"})}
    typed = ["--lora-target", "all", "all", "--lora-target", "--x", "all"]
    expected = ["--target-modules", "all-linear", "all", "--target-modules", "--x", "all"]
    assert resolve_flag_aliases(typed, specs).args == expected


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["evaluate", ""], "RUN|ADAPTER|MODEL: '' cannot be used for name"),
        (["quantize", "x", "--quant", "4bit"], "--out is missing: Output directory"),
        (["evaluate", "x", "--map", "text"], "--map text: expected NAME=COLUMN, as in summary="),
        (["merge", "x"], "Missing option '--out' / '-o'."),
    ],
)
def test_errors_name_argument_as_typed(arguments: list[str], start: str, cli: Cli) -> None:
    assert cli.fails(*arguments).startswith(f"ftlevel: {start}")


# Help.


def test_train_help_panels(capsys: pytest.CaptureFixture[str]) -> None:
    panels = parse_panels(get_help(capsys, "train"))
    headings = [f"{panel}:" for panel in (DAILY, MODEL, DATA, HOW, RUN, GENERAL)]
    assert list(panels)[1:] == ["Arguments:", *headings]
    assert panels[f"{DAILY}:"] == [
        "--model", "--dataset", "--task", "--method", "--quant", "--lora-r", "--num-train-epochs",
        "--learning-rate", "--per-device-train-batch-size", "-o,",
    ]  # fmt: skip
    assert panels[f"{GENERAL}:"] == "--json -q, --help-all --schema --traceback -h,".split()
    assert sum(map(len, panels.values())) == sum(
        not row.is_argument for row in flags_of("train")
    ) + len(["--help"])


def test_short_train_help_shows_common_flags(capsys: pytest.CaptureFixture[str]) -> None:
    full_panels = parse_panels(get_help(capsys, "train"))
    output = get_help(capsys, "train", help_flag="--help")
    panels = parse_panels(output)
    daily, more_options = f"{DAILY}:", list(panels)[-1]
    assert panels[daily] == full_panels[daily]
    assert panels[more_options] == ["--recipe", "--set", "--dry-run", "--help-all", "-h,"]
    hidden = sum(map(len, full_panels.values())) - sum(map(len, panels.values()))
    assert more_options == f"{hidden} more options: {MODEL}, {DATA}, {HOW}, {RUN}:"
    assert len(output.splitlines()) < 60


@pytest.mark.parametrize(
    "line",
    [
        "--quant none|4bit|8bit ",  # short choices replace the metavar
        "[error, drop, truncate, truncate-prompt, split; default:",  # longer ones in brackets
        "[default: 3]",
        "[default: 8 with lora]",
        "[default: builtin:tiny-llama]",
        "encoded rows of a large dataset. [default: on]",
    ],
)
def test_help_shows_choices_and_defaults(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert line in " ".join(get_help(capsys, "train").split())


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("name", commands())
def test_help_fits_terminal_width(
    name: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    longest = max(map(len, get_help(capsys, name).splitlines()))
    assert longest <= max(min(columns, 80), 60)


# Properties of every row.


@pytest.mark.parametrize("name", commands())
def test_commands_have_at_most_six_parameters(name: str) -> None:
    function = get_function(name)
    parameters = inspect.signature(function).parameters
    assert len(parameters) <= 6
    flag_parameters = {row.parameter for row in flags_of(name)}
    assert set(parameters) <= flag_parameters | {"inputs"}


@pytest.mark.parametrize("name", commands())
def test_every_flag_maps_to_described_field(name: str) -> None:
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
def test_every_flag_without_field_is_read(name: str) -> None:
    """A flag that sets no field is a parameter of its command or is read by name."""
    cli = Path(importlib.import_module("ftlevel.cli").__file__ or "").parent
    paths = (*cli.rglob("*.py"), *(cli.parent / "extras").rglob("cli.py"))
    text = "\n".join(path.read_text() for path in paths)
    parameters = inspect.signature(get_function(name)).parameters
    unused = [
        row.name
        for row in flags_of(name)
        if not row.path
        and row.parameter not in parameters
        and f'["{row.parameter}"]' not in text
        and f'"{row.name}" in ar' not in text
    ]
    assert unused == []


@pytest.mark.parametrize("name", commands())
def test_flag_names_are_unique(name: str) -> None:
    rows = flags_of(name)
    words = [word for row in rows for word in row.typer_names(is_switch=True)]
    names = [name for word in words for name in word.split("/")]
    parameters = [row.parameter for row in rows]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert len(parameters) == len(set(parameters))
    shared = [row for row in FLAGS if row.name in names]  # commands may have rows of one flag
    pairs = {(row.name, alias.name) for row in shared for alias in row.alias_names}
    invalid = [row.name for row in FLAGS if isinstance(row, UnsupportedFlag) and name in row.on]
    aliases = [alias for _, alias in pairs] + invalid
    assert [second for second, count in Counter(aliases).items() if count > 1] == []
    assert set(aliases) & set(names) <= {"--adapter", "--base"}  # flags of generate and evaluate


def test_rows_refer_to_existing_commands_and_fields() -> None:
    names = {row.name for row in FLAGS}
    assert {name for row in FLAGS for name in row.on} == set(commands())
    assert {"--model", "--lora-r", "--quant"} <= names
    with pytest.raises(KeyError, match="gone"):
        Flag("train.gone").metadata("train")


def test_field_metadata() -> None:
    mapping = get_field_metadata(EvaluateConfig, "columns")
    assert (mapping.type, mapping.default, mapping.required) == (list[str], "", False)
    kind = get_field_metadata(TrainConfig, "method.kind")
    assert (kind.default, kind.description) == ("lora", "Fine-tuning method.")
    assert {"lora", "full", "p-tuning"} <= set(kind.choices)
    assert get_field_metadata(TrainConfig, "data.max_length").choices == ()  # a number, or auto
    assert get_field_metadata(TrainConfig, "speed.parallel_workers").type is str
    assert get_field_metadata(TrainConfig, "train.save_total_limit").type is int
    assert get_field_metadata(EvaluateConfig, "name").required


def test_cli_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert write_docs.main(["cli", "--check"]) == 0, capsys.readouterr().out


def test_flag_table_does_not_import_typer() -> None:
    code = "import sys, ftlevel.config.flags; assert not {'typer', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("lines", "task"), [("task: rl\n", "rl"), ("seed: 1\n", "")])
def test_task_of_adapter_is_its_run_s(lines: str, task: str, tmp_path: Path) -> None:
    run_dir = open_run(tmp_path / "run", "run", overwrite=False)[0].path
    (run_dir / "config.yaml").write_text(lines)
    assert _get_adapter_task(str(run_dir)) == task
