from __future__ import annotations

import pytest

from ftlevel.data.formats.columns import Language, get_language, parse_language

GERMAN = Language("German", "de")


@pytest.mark.parametrize(
    ("column", "setting", "language"),
    [
        ("de", None, GERMAN),
        ("DE", None, GERMAN),
        ("de_AT", None, GERMAN),
        ("translation.de", None, GERMAN),
        ("target", None, None),
        ("design", None, None),
        ("en", "de", GERMAN),
        ("target", "german", GERMAN),
        ("target", "Klingon", Language("Klingon", "")),
    ],
)
def test_language_of_a_column(column, setting, language):
    assert get_language("target", {"target": column}, setting) == language


def test_regional_language_code():
    assert parse_language("pt-BR") == Language("Portuguese", "pt")
