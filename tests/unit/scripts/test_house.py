"""The figures of the house are within their bounds, and stand in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import house

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted({*(ROOT / "docs").glob("add-a*.md"), ROOT / "docs/architecture.md"})
FILE = re.compile(r"`((?:src|tests|scripts|docs|recipes|benchmarks)/[\w./-]+\.\w+)`")
TOY = {"src/ftlevel/config/methods/scale.py", "src/ftlevel/methods/scale.py"}  # of a page


@pytest.mark.parametrize(
    "figure", [*house.figures(), *house.sizes()], ids=lambda figure: figure.name
)
def test_no_figure_has_grown(figure: house.Figure) -> None:
    assert figure.value <= figure.bound


def test_the_table_stands_in_the_documentation() -> None:
    page = house.PAGE.read_text(encoding="utf-8")
    assert house.with_table(page, house.figures()) == page, "python scripts/house.py --write"


def test_a_figure_that_grows_is_seen() -> None:
    assert len(house.ADDITIONS["a kind of target, with its tests"][2].touched) == 3
    assert house.crossings() > 0
    text = '''"""A module."""\nimport os\n\n\ndef f(run: Run, config: TrainConfig) -> int:
    """Return one."""\n    # a comment\n    return 1\n'''
    assert house.code_lines(text) == (2, 2)
    assert house.takes(text, house._RUN_AND_CONFIG) == 1
    assert house.takes(text, house._WHOLE_CONFIG) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_names_are_there(page: Path) -> None:
    named = set(FILE.findall(page.read_text(encoding="utf-8"))) - TOY
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_the_index_leads_to_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\(([\w./-]+\.md)\)", index))
    there = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert there - links == set()
    assert [link for link in sorted(links) if not (ROOT / "docs" / link).is_file()] == []


def test_every_room_says_what_it_is_for() -> None:
    rooms = {path.parent for path in house.PACKAGE.rglob("*.py")} - {house.PACKAGE}
    silent = [room for room in rooms if not (room / "__init__.py").read_text().startswith('"""')]
    assert silent == []
