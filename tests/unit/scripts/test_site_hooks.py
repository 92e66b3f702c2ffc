"""The site's hooks: folders of the navigation, and links that leave docs/."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

import site_hooks


def test_a_folder_stands_for_its_pages() -> None:
    nav = [{"Home": "index.md"}, {"Methods": [{"Each": "guide/"}]}]
    [home, methods] = site_hooks.on_config({"nav": nav})["nav"]
    pages = methods["Methods"][0]["Each"]
    assert home == {"Home": "index.md"}
    assert pages[0] == "guide/index.md"
    assert {"guide/lora.md", "guide/full.md"} <= set(pages)


def test_a_link_out_of_docs_is_a_name_and_has_to_exist(caplog: pytest.LogCaptureFixture) -> None:
    place = str(site_hooks.DOCS / "tutorials/page.md")
    page = SimpleNamespace(file=SimpleNamespace(abs_src_path=place, src_uri="tutorials/page.md"))
    told = site_hooks.on_page_markdown(
        "[recipes/demo.yaml](../../recipes/demo.yaml) [a file](../../src/ftlevel/errors.py#L1) "
        "[start](../start.md)",
        page,
    )
    assert told == ("`recipes/demo.yaml` a file (`src/ftlevel/errors.py`) [start](../start.md)")
    with caplog.at_level(logging.WARNING, "mkdocs.hooks"):
        site_hooks.on_page_markdown("[x](../../nothing.py)", page)
    assert "links to ../../nothing.py, which does not exist" in caplog.text
