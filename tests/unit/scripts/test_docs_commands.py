"""Command blocks in the docs: every block is marked, and all commands and flags exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from docs_commands import PAGES, ROOT, Block, blocks_of, run_block, shorten, with_output
from ftlevel.cli.app import build_app, commands
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


def test_every_block_is_marked() -> None:
    assert [block.where for block in BLOCKS if not block.mark] == []
    assert sum(block.mark == "run in CI" for block in BLOCKS) >= 3
    assert len(CALLS) > 100


def test_documented_commands_parse() -> None:
    errors = []
    for where, arguments in CALLS:
        try:
            parse(arguments)
        except (ConfigError, typer.TyperException, AssertionError) as error:
            errors.append(f"{where}: ftlevel {' '.join(arguments)}: {error}")
        except typer.Exit:
            continue  # --help, --help-all
    assert errors == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_repository_pages_exist(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
    assert len(links) > 1
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("arguments", [["train", "--metod", "lora"], ["trian"], ["merge"]])
def test_invalid_command_raises(arguments: list[str]) -> None:
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


def test_parse_and_run_blocks_of_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_long_output_is_shortened() -> None:
    lines = shorten("\n".join(map(str, range(100)))).splitlines()
    assert (lines[0], lines[8], lines[-1], len(lines)) == ("0", "…", "99", 18)
    assert shorten("· loading\nx" * 1 + "\n 10%|#  | 1/10\ny") == "x\ny"
