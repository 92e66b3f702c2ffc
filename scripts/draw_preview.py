"""Draw docs/preview.svg and docs/preview.txt: the output of `ftlevel preview`.

python scripts/draw_preview.py
"""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

from ftlevel.cli.preview import show
from ftlevel.commands.preview import preview
from ftlevel.config import build_config, load_recipe

ROOT = Path(__file__).resolve().parents[1]
ROW = 108  # a short row, for a small picture


def main() -> None:
    """Write both files."""
    result = preview(build_config([load_recipe(ROOT / "recipes" / "demo.yaml")]), [ROW])
    for is_svg, name in ((True, "preview.svg"), (False, "preview.txt")):
        console = Console(
            file=io.StringIO(), record=is_svg, width=100, force_terminal=is_svg,
            soft_wrap=not is_svg,  # as when piped
        )  # fmt: skip
        show(result, console, full=False)
        if is_svg:
            text = console.export_svg(title="ftlevel preview recipes/demo.yaml")
            text = re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.DOTALL)  # no external fonts
        else:
            text = console.file.getvalue()  # type: ignore[attr-defined]
        (ROOT / "docs" / name).write_text(text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
