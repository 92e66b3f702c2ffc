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
ROW = 108  # a short one, so that the picture is small


def main() -> None:
    """Write both files."""
    found = preview(build_config([load_recipe(ROOT / "recipes" / "demo.yaml")]), [ROW])
    for colour, name in ((True, "preview.svg"), (False, "preview.txt")):
        console = Console(
            file=io.StringIO(), record=colour, width=100, force_terminal=colour,
            soft_wrap=not colour,  # as in a pipe
        )  # fmt: skip
        show(found, console, full=False)
        if colour:
            text = console.export_svg(title="ftlevel preview recipes/demo.yaml")
            text = re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.DOTALL)  # loads nothing
        else:
            text = console.file.getvalue()  # type: ignore[attr-defined]
        (ROOT / "docs" / name).write_text(text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
