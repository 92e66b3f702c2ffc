"""Method diagrams: up to date, well formed, for light and dark, with trained parts highlighted."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

import draw_methods
from draw_methods import DRAWINGS, LINEARS
from ftlevel.config import SPECS

SVG = "{http://www.w3.org/2000/svg}"


def count_trained_parts(name: str) -> int:
    """Return the number of parts drawn as trained, without the legend's."""
    tree = ElementTree.fromstring(draw_methods.draw(name, DRAWINGS[name]))
    return sum(part.get("class") == "on" for part in tree.iter()) - 1


def test_diagrams_are_up_to_date(capsys):
    assert draw_methods.main(["--check"]) == 0, capsys.readouterr().out
    assert set(DRAWINGS) <= set(SPECS)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("lora", len(LINEARS)), ("ia3", 3), ("adapter", 2), ("prefix", 2), ("prompt", 1),
     ("ln-tuning", 2), ("full", len(LINEARS) + 4)],
)  # fmt: skip
def test_trained_parts_are_highlighted(name, parts):
    assert count_trained_parts(name) == parts


@pytest.mark.parametrize("name", DRAWINGS)
def test_diagram_has_title_and_fits_view_box(name):
    text = draw_methods.draw(name, DRAWINGS[name])
    tree = ElementTree.fromstring(text)
    assert name in (tree.findtext(f"{SVG}title") or "")
    assert "prefers-color-scheme:dark" in text
    for box in tree.iter(f"{SVG}rect"):
        x, y, width, height = (float(box.get(key, 0)) for key in ("x", "y", "width", "height"))
        assert 0 <= x <= x + width <= 950
        assert 0 <= y <= y + height <= 330
