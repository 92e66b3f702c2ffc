"""What the README shows of `preview` is what the script last drew."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_readme_shows_lines_of_the_preview() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [excerpt] = re.findall(r"```\n([^`]*\[<\|im_end\|>\]⏎)\n```", readme)
    assert excerpt in (ROOT / "docs/preview.txt").read_text(encoding="utf-8")
