"""The preview in docs/proof.md is an excerpt of the generated docs/preview.txt."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_proof_page_shows_excerpt_of_preview():
    page = (ROOT / "docs/proof.md").read_text(encoding="utf-8")
    [excerpt] = re.findall(r"```\n([^`]*\[<\|im_end\|>\]⏎)\n```", page)
    assert excerpt in (ROOT / "docs/preview.txt").read_text(encoding="utf-8")
