"""Fill the generated parts of pages whose other text is written by hand, and their CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def fill(name: str, parts: Mapping[str, str], new: str = "") -> str:
    """Return docs/NAME.md with `parts`, each between `<!--generated:PART-->` and its end.

    `new` is the page if it does not exist.

    Raises:
        ValueError: the page has no such comments.
    """
    path = DOCS / f"{name}.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else new
    for part, content in parts.items():
        before, start, rest = text.partition(f"<!--generated:{part}-->\n")
        _, end, after = rest.partition("<!--/generated-->")
        if not end:
            raise ValueError(f"docs/{name}.md has no <!--generated:{part}-->, or no end of it")
        text = f"{before}{start}\n{content.strip()}\n\n{end}{after}"
    return text


def read_csv(name: str) -> list[dict[str, str]]:
    """Return the rows of docs/NAME."""
    with (DOCS / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def update_csv(name: str, rows: Iterable[dict[str, str]], keys: Sequence[str]) -> None:
    """Write `rows` to docs/NAME: in place of those with the same `keys`, or after all others."""
    old = read_csv(name)
    merged = {tuple(row[key] for key in keys): row for row in (*old, *rows)}
    with (DOCS / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(old[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged.values())
