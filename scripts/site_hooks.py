"""Hooks of mkdocs: folders in the navigation, links out of docs/, and messages by topic.

The navigation names folders of generated pages. Links from docs/ to sources and recipes become
plain names on the site; a link to a missing file fails the build. Each section of
troubleshooting.md lists its messages, so that the search finds them.
"""

from __future__ import annotations

import html
import logging
import re
from pathlib import Path
from typing import Any

from messages import messages

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]*)(?:#[^)\s]*)?\)")
_EMPTY_HEADER = re.compile(r"<th( [^>]*)?></th>")
_MIN_MESSAGE_LENGTH = 12  # minimum length of a listed message
_LIST = '<details markdown="1"><summary>Messages</summary>\n\n{}\n\n</details>\n'
_log = logging.getLogger("mkdocs.hooks")


def on_config(config: Any) -> Any:
    """Add the pages of a folder where the navigation names it with a trailing slash."""
    config["nav"] = [_expand(entry) for entry in config["nav"]]
    return config


def _expand(entry: Any) -> Any:
    if isinstance(entry, list):
        return [_expand(child) for child in entry]
    if isinstance(entry, dict):
        return {title: _expand(value) for title, value in entry.items()}
    if isinstance(entry, str) and entry.endswith("/"):
        names = sorted((DOCS / entry).glob("*.md"), key=lambda p: (p.stem != "index", p.stem))
        return [f"{entry}{name.name}" for name in names]
    return entry


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text with links out of docs/ as plain names, and messages by topic."""
    if page.file.src_uri == "troubleshooting.md":
        markdown = with_messages(markdown)
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


def on_page_content(html: str, **_: Any) -> str:
    """Return a page's HTML with plain cells for headers without text."""
    return _EMPTY_HEADER.sub(r"<td\1></td>", html)


def with_messages(markdown: str) -> str:
    """Return the text of troubleshooting.md with the messages of each section at its end."""
    texts: dict[str, list[str]] = {}
    for message in messages():
        if message.topic and len(message.text.strip("…:. ")) > _MIN_MESSAGE_LENGTH:
            texts.setdefault(message.topic, []).append(f"- {message.text}")
    head, *sections = re.split(r"^## ", markdown, flags=re.MULTILINE)
    for number, section in enumerate(sections):
        lines = sorted(set(texts.get(section.partition("\n")[0].lower(), ())))
        if lines:
            listed = html.escape("\n".join(lines), quote=False)
            sections[number] = f"{section.rstrip()}\n\n{_LIST.format(listed)}\n"
    return "## ".join([head, *sections])
