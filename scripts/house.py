"""How much a feature touches, and how large the rooms are: the table of docs/architecture.md.

    python scripts/house.py            # print the table; exit 1 where a figure is above its bound
    python scripts/house.py --write    # and put it into docs/architecture.md

Features are the toy additions of tests/additions, which tests add to a copy of ftlevel and use.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "ftlevel"
PAGE = ROOT / "docs/architecture.md"
sys.path.insert(0, str(ROOT / "tests"))

from additions.tree import ADDITIONS  # noqa: E402 - found by the line above

WAY = (
    "ftlevel.data.sources.splits",
    "ftlevel.data.prepare.loading",
    "ftlevel.data.formats.convert",
    "ftlevel.data.prepare.encoder",
    "ftlevel.tasks.text",
    "ftlevel.data.encoding.encode",
    "ftlevel.data.encoding.fit",
    "ftlevel.data.gate.gate",
    "ftlevel.data.prepare.examples",
    "ftlevel.data.prepare.dataset",
    "ftlevel.training.row_order",
    "ftlevel.fast.step_collator",
)
"""The modules through which a row of a text task goes, from a source to a batch."""


@dataclass(frozen=True)
class Figure:
    """A line of the table.

    Attributes:
        name: what is counted.
        before: the figure of 0.1.0.
        bound: the most that it may be.
        value: what it is.
    """

    name: str
    before: str
    bound: int
    value: int


def largest_folder() -> tuple[Path, int]:
    """Return the folder of the package with the most modules, and how many."""
    counts = Counter(path.parent for path in PACKAGE.rglob("*.py"))
    return max(counts.items(), key=lambda item: item[1])


def room_of(module: str) -> str:
    """Return the room that a module lies in."""
    return module.split(".")[1]


def crossings() -> int:
    """Return how often a row goes from one room to another between its source and its batch.

    Raises:
        FileNotFoundError: a module of the way is not there.
    """
    for module in WAY:
        path = SOURCE / (module.replace(".", "/") + ".py")
        ast.parse(path.read_text(encoding="utf-8"))
    return sum(room_of(one) != room_of(other) for one, other in pairwise(WAY))


def source_lines() -> int:
    """Return the lines of the package."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py"))


def figures() -> list[Figure]:
    """Return the table."""
    additions = [
        Figure(f"files touched by {name}", before, bound, len(addition.touched))
        for name, (before, bound, addition) in ADDITIONS.items()
    ]
    return [
        *additions,
        Figure("files in the largest folder", "67", 15, largest_folder()[1]),
        Figure("crossings between rooms of a data row", "~10", 4, crossings()),
    ]


def table(found: list[Figure]) -> str:
    """Return the figures as a Markdown table."""
    lines = ["| | 0.1.0 | at most | now |", "|---|--:|--:|--:|"]
    lines += [f"| {f.name} | {f.before} | {f.bound:,} | {f.value:,} |" for f in found]
    return "\n".join(lines)


def with_table(page: str, found: list[Figure]) -> str:
    """Return `page` with the table between its marks."""
    before, begin, rest = page.partition("<!-- house -->\n")
    _, end, after = rest.partition("<!-- /house -->")
    return f"{before}{begin}{table(found)}\n{end}{after}"


def main() -> None:
    """Print the table, and what the package holds; exit 1 where a figure is above its bound."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put it into docs/architecture.md")
    arguments = parser.parse_args()
    found = figures()
    print(table(found))
    print(f"\n{source_lines():,} lines in the package")
    if arguments.write:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    grown = [figure for figure in found if figure.value > figure.bound]
    for figure in grown:
        print(f"{figure.name}: {figure.value:,}, and at most {figure.bound:,} are allowed")
    if grown:
        sys.exit(1)


if __name__ == "__main__":
    main()
