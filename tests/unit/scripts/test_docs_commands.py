"""Command blocks and the text of the docs: commands, flags, settings, files and names exist."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import typer

from docs_commands import PAGES, ROOT, Block, blocks_of, run_block, shorten, with_output
from ftlevel.cli.app import build_app, commands
from ftlevel.cli.spelling import build_flag_specs
from ftlevel.config import TrainConfig
from ftlevel.config.flag import get_field_metadata
from ftlevel.config.flags import FLAGS
from ftlevel.errors import ConfigError

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
CALLS = [(block.where, words) for block in BLOCKS for words in block.commands()]


@cache
def build_parser(*names: str) -> Any:
    return typer.main.get_command(build_app(names))


def parse(arguments: list[str]) -> None:
    """Parse a command line without running it."""
    group = build_parser(*arguments[:1])
    if arguments[:1] and not arguments[0].startswith("-"):
        assert arguments[0] in commands(), f"no such command: {arguments[0]}"
        group.commands[arguments[0]].make_context(arguments[0], arguments[1:], obj=arguments)


def test_every_block_is_marked():
    assert [block.where for block in BLOCKS if not block.mark] == []
    assert sum(block.mark == "run in CI" for block in BLOCKS) >= 3
    assert len(CALLS) > 100


def test_documented_commands_parse():
    errors = []
    for where, arguments in CALLS:
        try:
            parse(arguments)
        except (ConfigError, typer.TyperException, AssertionError) as error:
            errors.append(f"{where}: ftlevel {' '.join(arguments)}: {error}")
        except typer.Exit:
            continue  # --help, --help-all
    assert errors == []


FOREIGN = {
    "--backend-store-uri": "mlflow",
    "--cache-ram": "llama-server",
    "--cuda": "make gpu-kit",
    "--debug": "axolotl",
    "--help": "every command",
    "--lora": "llama-server",
    "--max-lora-rank": "vLLM",
    "--only": "make torture",
    "--requeue": "sbatch",
    "--share": "make torture",
    "--signal": "sbatch",
    "--tiny": "the kit for a GPU",
    "--validation-rows": "the example of docs/add-a-flag.md",
    "--weight-format": "optimum-cli",
}
"""Flags of other programs that the text names."""
NOT_FTLEVEL = re.compile(r"(python|trl|mypy|\S*benchmarks/|--sides|--rows 1)")


def spans(kept: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Yield the page and text of each code span with `kept`, outside of blocks of code."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for span in re.findall(r"`([^`\n]+)`", text):
            if kept.search(span):
                yield str(page.relative_to(ROOT)), span


def test_flags_in_the_text_are_known():
    known = {flag for command in commands() for flag in build_flag_specs(command, FLAGS)}
    other_tools = ("docs/coming-from.md", "docs/switching.md", "docs/commands/")
    found = [
        (page, flag)
        for page, span in spans(re.compile("--[a-z]"))
        if not page.startswith(other_tools) and not NOT_FTLEVEL.match(span)
        for flag in re.findall(r"(?<![\w/-])--[a-z][\w-]*", span)
    ]
    assert len(found) > 300
    assert [
        (page, flag) for page, flag in found if flag.replace("_", "-") not in known | FOREIGN.keys()
    ] == []


def test_settings_in_the_text_are_fields():
    found = [
        (page, key)
        for page, span in spans(re.compile("--set "))
        for key in re.findall(r"--set '?([a-z_0-9.]+\.[a-z_0-9]+)=", span)
    ]
    assert len(found) > 20
    for page, key in found:
        assert get_field_metadata(TrainConfig, key), page


def test_python_names_in_the_text_exist():
    names = {span for _, span in spans(re.compile(r"^ftlevel(\.\w+)+$"))} - {"ftlevel.json"}
    assert len(names) > 5
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute) or find_spec(name), name


def test_files_in_the_text_exist():
    """Those that left name the commit that had them."""
    path = re.compile(r"(?<![\w/.-])(?:src|tests|scripts|benchmarks|recipes|examples)/[\w./-]*\w")
    new = {"docs/add-a-method.md": "scale.py"}
    missing = [
        (page.name, name)
        for page in PAGES
        for paragraph in re.split(r"\n(?:\n|(?=[|-]))", page.read_text(encoding="utf-8"))
        for name in path.findall(paragraph)
        if not any((ROOT / f"{name}{end}").exists() for end in ("", ".py"))
        and not re.search(r"commit [0-9a-f]{8}", paragraph)
        and not name.endswith(new.get(str(page.relative_to(ROOT)), "/"))
    ]
    assert missing == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_repository_pages_exist(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
    assert len(links) > 1
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("arguments", [["train", "--metod", "lora"], ["trian"], ["merge"]])
def test_invalid_command_raises(arguments):
    with pytest.raises((ConfigError, typer.TyperException, AssertionError)):
        parse(arguments)


PAGE = """\
# A page

<!-- run -->
```sh
echo 1 | cat  # and more
ftlevel train --lora-r 8 \\
  --seed 1 > file
```

```text
old
```

```sh
$ X=1 ftlevel doctor && ftlevel plan --gpu 24GB
```
"""


def test_parse_and_run_blocks_of_page(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    first, second = blocks_of(page)
    assert (first.mark, first.line, second.mark) == ("run", 5, "")
    assert list(first.commands()) == [["train", "--lora-r", "8", "--seed", "1"]]
    assert list(second.commands()) == [["doctor"], ["plan", "--gpu", "24GB"]]
    assert with_output(PAGE, first, "new\n") == PAGE.replace("old", "new")
    monkeypatch.setattr("docs_commands.ROOT", tmp_path)
    output, _ = run_block(Block(page, 1, "run", "echo $((1 + 1))"), tmp_path)
    assert output == "2\n"
    for mark, command in (("run", "false | cat"), ("run, fails", "true")):
        with pytest.raises(RuntimeError, match=r"page.md:1: exit code"):
            run_block(Block(page, 1, mark, command), tmp_path)


def test_long_output_is_shortened():
    lines = shorten("\n".join(map(str, range(100)))).splitlines()
    assert (lines[0], lines[3], lines[-1], len(lines)) == ("0", "…", "99", 13)
    assert shorten("· loading\nx" * 1 + "\n 10%|#  | 1/10\ny") == "x\ny"
