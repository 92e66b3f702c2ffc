"""Every recipe loads and has a complete header; together they cover methods and tasks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ftlevel.config import SPECS, build_config, load_recipe
from ftlevel.tasks import TASKS
from guide_pages import RARE

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_header_has_measured_result(path):
    config = build_config([load_recipe(path)])
    assert config.output.dir is None, "a run goes where the user says"
    header = path.read_text(encoding="utf-8").partition("\ntask:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    parts = re.findall(r"^# (What it does|Needs|Command|Result) +(\S.*)$", header, re.MULTILINE)
    assert [name for name, _ in parts] == ["What it does", "Needs", "Command", "Result"]
    header_fields = dict(parts)
    assert header_fields["Command"].split("  ")[0].strip() == f"ftlevel train recipes/{path.name}"
    assert re.search(r"\d\.\d", header.partition("# Result")[2]), "a figure that was measured"


def test_every_method_and_task_has_a_recipe():
    """Rare methods have none: they are rows of docs/guide/rare.md."""
    configs = [build_config([load_recipe(path)]) for path in RECIPES]
    assert {config.method.kind for config in configs} == set(SPECS) - set(RARE)
    assert {config.task for config in configs} == set(TASKS)
    assert {config.quant.kind for config in configs} == {"none", "4bit", "8bit"}
