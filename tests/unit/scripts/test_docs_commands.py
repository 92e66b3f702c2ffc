"""Every command on a page: it says whether it is run, and its flags are flags that there are."""

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
def parser_of(*names: str) -> Any:
    return typer.main.get_command(build_app(names))


def parse(words: list[str]) -> None:
    """Read a command line as the program would, and run nothing."""
    group = parser_of(*words[:1])
    if words[:1] and not words[0].startswith("-"):
        assert words[0] in commands(), f"no such command: {words[0]}"
        group.commands[words[0]].make_context(words[0], words[1:], obj=words)


def test_every_block_says_whether_it_is_run() -> None:
    assert [block.where for block in BLOCKS if not block.mark] == []
    assert sum(block.mark == "run in CI" for block in BLOCKS) >= 3
    assert len(CALLS) > 100


def test_the_flags_of_every_command_are_known() -> None:
    wrong = []
    for where, words in CALLS:
        try:
            parse(words)
        except (ConfigError, typer.TyperException, AssertionError) as error:
            wrong.append(f"{where}: ftlevel {' '.join(words)}: {error}")
        except typer.Exit:
            continue  # --help, --help-all
    assert wrong == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_pages_that_are_not_on_the_site(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
    assert len(links) > 1
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("words", [["train", "--metod", "lora"], ["trian"], ["merge"]])
def test_a_command_that_is_wrong_is_found(words: list[str]) -> None:
    with pytest.raises((ConfigError, typer.TyperException, AssertionError)):
        parse(words)


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


def test_blocks_commands_and_outputs_of_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_long_output_loses_its_middle() -> None:
    lines = shorten("\n".join(map(str, range(100)))).splitlines()
    assert (lines[0], lines[8], lines[-1], len(lines)) == ("0", "…", "99", 18)
    assert shorten("· loading\nx" * 1 + "\n 10%|#  | 1/10\ny") == "x\ny"
