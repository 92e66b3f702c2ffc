"""bible-text: chapters of a public-domain English Bible, as plain text without notes."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from data_sets.sources import Sources
from data_sets.splits import Row, Splits, split_rows, squeeze
from wheels import FetchError

DEB = "sword-text-web"
BOOKS = (
    "Genesis",
    "Exodus",
    "I Samuel",
    "II Samuel",
    "Proverbs",
    "Matthew",
    "Mark",
    "Luke",
    "John",
    "Acts",
)


def plain_verse(markup: str) -> str:
    """Return the words of a verse in OSIS markup, without notes and headings."""
    for element in ("note", "title"):
        markup = re.sub(rf"<{element}.*?</{element}>", " ", markup, flags=re.DOTALL)
    words = squeeze(re.sub(r"<[^>]+>", "", markup))
    return squeeze(re.sub(r" ([,.;:?!’”])", r"\1", words))


def chapter_rows(chapters: Iterable[tuple[str, int, list[str]]]) -> Iterator[Row]:
    """Yield reference and text of every chapter that has a verse."""
    for book, number, verses in chapters:
        text = " ".join(verse for verse in map(plain_verse, verses) if verse)
        if text:
            yield {"ref": f"{book} {number}", "text": text}


def read_chapters(module: Any) -> Iterator[tuple[str, int, list[str]]]:
    """Yield book, chapter and raw verses of the chosen books of a pysword module."""
    # A chapter is one compressed block, which pysword would unpack for every verse.
    module._decompressed_text = functools.lru_cache(None)(module._decompressed_text)
    for books in module.get_structure().get_books().values():
        for book in books:
            if book.name not in BOOKS:
                continue
            for chapter in range(1, book.num_chapters + 1):
                verses = [
                    module.get(
                        books=[book.name],
                        chapters=[chapter],
                        verses=[verse],
                        clean=False,
                        join="\n",
                    )
                    for verse in range(1, book.chapter_lengths[chapter - 1] + 1)
                ]
                yield book.name, chapter, verses


def build_text(name: str, sources: Sources) -> Splits:
    """Build bible-text.

    Raises:
        FetchError: when pysword, which reads the package's format, is not installed.
    """
    try:
        from pysword.modules import SwordModules
    except ImportError:
        raise FetchError(
            "bible-text needs pysword, which is not installed. Run: pip install 'pysword>=0.2.8'"
        ) from None
    modules = SwordModules(str(sources.deb(DEB) / "usr/share/sword"))
    text = modules.get_bible_from_module(next(iter(modules.parse_modules())))
    rows = chapter_rows(read_chapters(text))
    return split_rows(name, rows, (400, 40, 40), key=lambda row: str(row["ref"]))
