"""Hooks of the docs site: directories in the navigation, and links out of docs/."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import site_hooks


def test_directory_in_navigation_is_expanded():
    nav = [{"Home": "index.md"}, {"Methods": [{"Each": "guide/"}]}]
    [home, methods] = site_hooks.on_config({"nav": nav})["nav"]
    pages = methods["Methods"][0]["Each"]
    assert home == {"Home": "index.md"}
    assert pages[0] == "guide/index.md"
    assert {"guide/lora.md", "guide/full.md"} <= set(pages)


def test_link_out_of_docs_becomes_code_and_must_exist(caplog):
    path = str(site_hooks.DOCS / "tutorials/page.md")
    page = SimpleNamespace(file=SimpleNamespace(abs_src_path=path, src_uri="tutorials/page.md"))
    markdown = site_hooks.on_page_markdown(
        "[recipes/demo.yaml](../../recipes/demo.yaml) [a file](../../src/ftlevel/errors.py#L1) "
        "[start](../start.md)",
        page,
    )
    assert markdown == ("`recipes/demo.yaml` a file (`src/ftlevel/errors.py`) [start](../start.md)")
    with caplog.at_level(logging.WARNING, "mkdocs.hooks"):
        site_hooks.on_page_markdown("[x](../../nothing.py)", page)
    assert "links to ../../nothing.py, which does not exist" in caplog.text
