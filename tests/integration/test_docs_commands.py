"""A fixed sample of the commands in docs/, run as written.

`make docs-commands` runs all commands with this mark.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import forked
from docs_commands import PAGES, Block, blocks_of, create_directory, run_block

SAMPLE = [block for page in PAGES for block in blocks_of(page) if block.mark == "run in CI"]
EXPECTED_OUTPUT = {
    "rl.md": "loss: dapo",
    "start.md": "# learning_rate: ",
    "switching.md": "output:\n  dir: ",
}
"""Page → part of the output of its commands."""

FORKED = ("rl.md", "start.md")
"""Pages whose commands import torch: they are forked. The others run the installed program."""


@pytest.mark.slow
@pytest.mark.parametrize("block", SAMPLE, ids=lambda block: block.where)
def test_documented_commands_run(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block.page.name in FORKED:
        forked.connect("ftlevel")
        functions = tmp_path / "functions.sh"
        functions.write_text(f'ftlevel() {{ "{sys.executable}" "{forked.__file__}" run "$@"; }}\n')
        monkeypatch.setenv("BASH_ENV", str(functions))
    create_directory(tmp_path / "page", tmp_path, tmp_path)
    output, _ = run_block(block, tmp_path / "page")
    assert EXPECTED_OUTPUT[block.page.name] in output
