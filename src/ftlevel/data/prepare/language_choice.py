"""The languages of a translation: found in the names of the columns, and shown."""

from __future__ import annotations

from ftlevel.config import DataConfig
from ftlevel.config.choices import Choice
from ftlevel.data.formats.detect import Format
from ftlevel.data.formats.languages import Language, find_language


def find_languages(config: DataConfig, shape: Format) -> tuple[Language, Language] | None:
    """Return the languages of source and target; None where the columns do not tell."""
    source = find_language("source", shape.columns, config.source_language)
    target = find_language("target", shape.columns, config.target_language)
    return (source, target) if source and target else None


def language_choice(languages: tuple[Language, Language] | None) -> Choice:
    """Return the line for the screen."""
    if languages is None:
        return Choice(
            "languages",
            "not named in the prompt",
            "the columns are no codes: --set data.source_language=… --set data.target_language=…",
        )
    return Choice("languages", f"{languages[0].name} to {languages[1].name}")
