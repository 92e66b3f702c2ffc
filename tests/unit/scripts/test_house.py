"""Code size figures are within bounds and documented; pages refer to existing files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import house

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted({*(ROOT / "docs").glob("add-a*.md"), ROOT / "docs/architecture.md"})
FILE_PATTERN = re.compile(
    r"`((?:src|tests|scripts|docs|recipes|benchmarks)/[\w./-]+\.\w+)(?::([\w.]+))?`"
)
EXAMPLE_FILES = {
    "src/ftlevel/config/methods/scale.py",
    "src/ftlevel/methods/scale.py",
}  # in the tutorial


def test_figures_are_within_bounds():
    figures = [*house.figures(), *house.sizes()]
    assert [figure for figure in figures if figure.value > figure.bound] == []


def test_table_of_figures_is_up_to_date():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert house.page() == page, "python scripts/house.py --write"


def test_figures_are_measured():
    assert len(house.ADDITIONS["a kind of target, with its tests"][1].touched) == 3
    assert house.crossings() > 0
    text = '''"""A module."""\nimport os\n\n\ndef f(run: Run, config: TrainConfig) -> int:
    """Return one."""\n    # a comment\n    return 1\n'''
    assert house.code_lines(text) == (2, 2)
    assert house.count_functions(text, house._RUN_AND_CONFIG) == 1
    assert house.count_functions(text, house._WHOLE_CONFIG) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_page_exist(page):
    files = {name for name, _ in FILE_PATTERN.findall(page.read_text(encoding="utf-8"))}
    assert files
    assert [name for name in files - EXAMPLE_FILES if not (ROOT / name).is_file()] == []


def test_functions_named_in_architecture_exist() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = [(file, name) for file, name in FILE_PATTERN.findall(page) if name]
    assert len(named) > 100
    for file, name in named:
        text, (first, _, method) = (ROOT / file).read_text(encoding="utf-8"), name.partition(".")
        assert re.search(rf"^(class |def |){first}\b[(:\[ ]", text, re.M), f"{file}:{name}"
        assert not method or re.search(rf"^    def {method}\b", text, re.M), f"{file}:{name}"


def test_index_links_every_page():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\(([\w./-]+\.md)\)", index))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages - links == set()
    assert [link for link in sorted(links) if not (ROOT / "docs" / link).is_file()] == []


def test_every_package_has_docstring():
    packages = {path.parent for path in house.PACKAGE.rglob("*.py")} - {house.PACKAGE}
    undocumented = [
        package
        for package in packages
        if not (package / "__init__.py").read_text().startswith('"""')
    ]
    assert undocumented == []
