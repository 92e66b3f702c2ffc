"""Languages of translation data: read from column names, or given, and named in English."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# ISO 639-1; the languages that published parallel corpora are mostly in.
_NAMES = {
    "af": "Afrikaans", "am": "Amharic", "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian",
    "bg": "Bulgarian", "bn": "Bengali", "bs": "Bosnian", "ca": "Catalan", "cs": "Czech",
    "cy": "Welsh", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "eo": "Esperanto", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian",
    "fi": "Finnish", "fr": "French", "ga": "Irish", "gl": "Galician", "gu": "Gujarati",
    "ha": "Hausa", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian",
    "hy": "Armenian", "id": "Indonesian", "ig": "Igbo", "is": "Icelandic", "it": "Italian",
    "ja": "Japanese", "ka": "Georgian", "kk": "Kazakh", "km": "Khmer", "kn": "Kannada",
    "ko": "Korean", "ky": "Kyrgyz", "la": "Latin", "lo": "Lao", "lt": "Lithuanian",
    "lv": "Latvian", "mk": "Macedonian", "ml": "Malayalam", "mn": "Mongolian", "mr": "Marathi",
    "ms": "Malay", "mt": "Maltese", "my": "Burmese", "ne": "Nepali", "nl": "Dutch",
    "no": "Norwegian", "pa": "Punjabi", "pl": "Polish", "ps": "Pashto", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "sd": "Sindhi", "si": "Sinhala", "sk": "Slovak",
    "sl": "Slovenian", "so": "Somali", "sq": "Albanian", "sr": "Serbian", "sv": "Swedish",
    "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "tg": "Tajik", "th": "Thai", "tl": "Tagalog",
    "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese",
    "xh": "Xhosa", "yi": "Yiddish", "yo": "Yoruba", "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip


@dataclass(frozen=True)
class Language:
    """A language; `code` is that of ISO 639-1, or empty for one given by another name."""

    name: str
    code: str


def find_language(role: str, columns: Mapping[str, str], given: str | None) -> Language | None:
    """Return the language of a role's column, or None if nothing tells it.

    Args:
        role: source or target.
        columns: the column of each role, such as `de` or `translation.de`.
        given: what the user says, a code or a name; it goes first.
    """
    if given is not None:
        return read_language(given)
    return _by_code(columns.get(role, "").rpartition(".")[2])


def read_language(text: str) -> Language:
    """Return the language of a code such as `de` or `pt_BR`, or of a name such as German."""
    by_code = _by_code(text)
    if by_code is not None:
        return by_code
    code = next((code for code, name in _NAMES.items() if name.lower() == text.lower()), "")
    return Language(_NAMES.get(code, text), code)


def _by_code(text: str) -> Language | None:
    code = text.replace("_", "-").partition("-")[0].lower()
    return Language(_NAMES[code], code) if code in _NAMES and len(text) <= 5 else None
