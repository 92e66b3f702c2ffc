"""What the page about proofs shows of `preview` is what the script last drew."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_a_page_shows_lines_of_the_preview() -> None:
    page = (ROOT / "docs/proof.md").read_text(encoding="utf-8")
    [excerpt] = re.findall(r"```\n([^`]*\[<\|im_end\|>\]⏎)\n```", page)
    assert excerpt in (ROOT / "docs/preview.txt").read_text(encoding="utf-8")
