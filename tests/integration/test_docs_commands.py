"""A fixed sample of the commands on the pages of docs/, run as they stand there.

`make docs-commands` runs all that are marked so.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from docs_commands import PAGES, Block, blocks_of, make_place, run_block

SAMPLE = [block for page in PAGES for block in blocks_of(page) if block.mark == "run in CI"]
TOLD = {
    "rl.md": "loss: dapo",
    "start.md": "# learning_rate: ",
    "switching.md": "output:\n  dir: ",
}
"""Page → what its commands print."""


@pytest.mark.slow
@pytest.mark.parametrize("block", SAMPLE, ids=lambda block: block.where)
def test_what_a_page_says_can_be_typed(block: Block, tmp_path: Path) -> None:
    make_place(tmp_path / "page", tmp_path, tmp_path)
    output, _ = run_block(block, tmp_path / "page")
    assert TOLD[block.page.name] in output
