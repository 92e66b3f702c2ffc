"""cldr-names: names of characters and symbols in four languages, from Unicode's CLDR."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping

from data_sets.sources import Sources
from data_sets.splits import Row, Splits, split_rows

DEB = "unicode-cldr-core"
LANGUAGES = ("en", "de", "fr", "es")
SPOKEN_NAME = re.compile(r'<annotation cp="([^"]+)" type="tts">([^<]+)</annotation>')


def parse_names(xml: str) -> dict[str, str]:
    """Return the spoken name of every character sequence of an annotation file."""
    return {character: html.unescape(name) for character, name in SPOKEN_NAME.findall(xml)}


def name_rows(names: Mapping[str, Mapping[str, str]]) -> Iterator[Row]:
    """Yield names that all languages have; an arrow means that a language inherits another's."""
    for character, english in names["en"].items():
        if not all(character in names[language] for language in LANGUAGES):
            continue
        row = {language: names[language][character] for language in LANGUAGES}
        if len(english) > 3 and "skin tone" not in english and "↑" not in "".join(row.values()):
            yield row


def build_names(name: str, sources: Sources) -> Splits:
    """Build cldr-names; variants of one symbol ("flag: …") stay in one split."""
    common = sources.deb(DEB) / "usr/share/unicode/cldr/common"
    names = {
        language: {
            character: spoken
            for part in ("annotations", "annotationsDerived")
            for character, spoken in parse_names(
                (common / part / f"{language}.xml").read_text(encoding="utf-8")
            ).items()
        }
        for language in LANGUAGES
    }
    return split_rows(
        name,
        name_rows(names),
        (1600, 200, 200),
        key=lambda row: str(row["en"]),
        group=lambda row: str(row["en"].split(":")[0]),
    )
