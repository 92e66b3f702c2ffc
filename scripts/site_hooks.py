"""Hooks of mkdocs: folders in the navigation, and links out of docs/.

Pages that are written by a script come and go with what they are about, so the navigation names
their folder. The pages of docs/ link to sources and recipes beside it. On the site these are no
pages; a link to one that does not exist fails the build as any other does.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]*)(?:#[^)\s]*)?\)")
_log = logging.getLogger("mkdocs.hooks")


def on_config(config: Any) -> Any:
    """Put the pages of a folder where the navigation names it with a slash at its end."""
    config["nav"] = [_expand(entry) for entry in config["nav"]]
    return config


def _expand(entry: Any) -> Any:
    if isinstance(entry, list):
        return [_expand(part) for part in entry]
    if isinstance(entry, dict):
        return {title: _expand(value) for title, value in entry.items()}
    if isinstance(entry, str) and entry.endswith("/"):
        names = sorted((DOCS / entry).glob("*.md"), key=lambda p: (p.stem != "index", p.stem))
        return [f"{entry}{name.name}" for name in names]
    return entry


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text with links out of docs/ as plain names."""
    folder = Path(page.file.abs_src_path).parent

    def name(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if target.is_relative_to(DOCS):
            return link[0]
        if not target.exists():
            _log.warning("%s links to %s, which does not exist", page.file.src_uri, link[2])
        path = target.relative_to(ROOT) if target.is_relative_to(ROOT) else link[2]
        return f"{link[1]} (`{path}`)" if str(path) != link[1].strip("`") else f"`{path}`"

    return _LINK.sub(name, markdown)
