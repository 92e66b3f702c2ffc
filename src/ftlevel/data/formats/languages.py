"""Languages of translation data, from column names or flags, with their English names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ftlevel.data.sources.table import Row
from ftlevel.errors import InputError, join_names

# ISO 639-1 codes of the languages common in published parallel corpora.
_NAMES = dict(
    pair.split("=")
    for pair in """
    af=Afrikaans am=Amharic ar=Arabic az=Azerbaijani be=Belarusian bg=Bulgarian bn=Bengali
    bs=Bosnian ca=Catalan cs=Czech cy=Welsh da=Danish de=German el=Greek en=English
    eo=Esperanto es=Spanish et=Estonian eu=Basque fa=Persian fi=Finnish fr=French ga=Irish
    gl=Galician gu=Gujarati ha=Hausa he=Hebrew hi=Hindi hr=Croatian hu=Hungarian hy=Armenian
    id=Indonesian ig=Igbo is=Icelandic it=Italian ja=Japanese ka=Georgian kk=Kazakh km=Khmer
    kn=Kannada ko=Korean ky=Kyrgyz la=Latin lo=Lao lt=Lithuanian lv=Latvian mk=Macedonian
    ml=Malayalam mn=Mongolian mr=Marathi ms=Malay mt=Maltese my=Burmese ne=Nepali nl=Dutch
    no=Norwegian pa=Punjabi pl=Polish ps=Pashto pt=Portuguese ro=Romanian ru=Russian sd=Sindhi
    si=Sinhala sk=Slovak sl=Slovenian so=Somali sq=Albanian sr=Serbian sv=Swedish sw=Swahili
    ta=Tamil te=Telugu tg=Tajik th=Thai tl=Tagalog tr=Turkish uk=Ukrainian ur=Urdu uz=Uzbek
    vi=Vietnamese xh=Xhosa yi=Yiddish yo=Yoruba zh=Chinese zu=Zulu
    """.split()
)


@dataclass(frozen=True)
class Language:
    """A language with its ISO 639-1 code, or "" if the name is unknown."""

    name: str
    code: str


def find_language(role: str, columns: Mapping[str, str], given: str | None) -> Language | None:
    """Return the language of a role, from `given` (code or name) or the name of its column."""
    if given is not None:
        return parse_language(given)
    key = columns.get(role, "").rpartition(".")[2]
    return _by_code(key) or _by_name(key)


def language_columns(columns: Sequence[str], rows: Sequence[Row]) -> dict[str, str]:
    """Return the column of each language, by column names or by keys of `translation`.

    `rows` are a sample, used to list the keys and to distinguish the column `id` from Indonesian.
    """
    inside = next((c for c in columns if c.lower() == "translation"), None)
    value = rows[0].get(inside) if inside is not None and rows else None
    if isinstance(value, dict):
        paths = {key: f"{inside}.{key}" for key in value}
    else:
        paths = {column: column for column in columns}
    found: dict[str, str] = {}
    for key, path in paths.items():
        language = _by_code(key) or _by_name(key)
        is_id = key.lower() == "id" and (len(paths) > 2 or (rows and type(rows[0].get(key)) is int))
        if language is not None and not is_id:
            found.setdefault(language.name, path)
    return found


def select_language_columns(
    found: Mapping[str, str], source: str | None, target: str | None, told: Mapping[str, str]
) -> dict[str, str]:
    """Return the columns of the roles source and target, selected from `found` by language.

    `source` and `target` are languages given by the user. `told` maps roles to columns and takes
    precedence. Raises `InputError` if the direction is ambiguous or a language is missing.
    """
    if not found or {"source", "target"} <= told.keys():
        return {}
    wishes = {"source": source, "target": target}
    chosen = {role: told[role] for role in wishes if role in told}
    for role, wish in wishes.items():
        column = found.get(parse_language(wish).name) if wish else None
        if column is not None:
            chosen.setdefault(role, column)
        elif wish and len(found) > 1 and role not in told:
            raise InputError(
                f"--{role}-language {wish}: no column is called so. Languages: {_listed(found)}. "
                f"Name one of them, or the column: --map {role}=COLUMN."
            )
    rest = [column for column in found.values() if column not in chosen.values()]
    open_roles = [role for role in wishes if role not in chosen]
    if len(open_roles) == 1 and len(rest) == 1 and chosen:
        return {**chosen, open_roles[0]: rest[0]}
    if open_roles and len(found) > 1:
        first, second = (column.rpartition(".")[2] for column in list(found.values())[:2])
        raise InputError(
            f"--task translation: the columns are languages ({_listed(found)}), and nothing says "
            f"which is the source. Add --source-language {first} --target-language {second}, or "
            "another pair."
        )
    if open_roles and target is not None and source is None and len(found) == 1 and not chosen:
        return {"source": rest[0]}  # rows to translate have no target
    return chosen


def _listed(found: Mapping[str, str]) -> str:
    return join_names(repr(column) for column in found.values())


def parse_language(text: str) -> Language:
    """Return the language of a code such as `de` or `pt_BR`, or of an English name."""
    return _by_code(text) or _by_name(text) or Language(text, "")


def _by_name(text: str) -> Language | None:
    code = next((code for code, name in _NAMES.items() if name.lower() == text.lower()), "")
    return Language(_NAMES[code], code) if code else None


def _by_code(text: str) -> Language | None:
    code = text.replace("_", "-").partition("-")[0].lower()
    return Language(_NAMES[code], code) if code in _NAMES and len(text) <= 5 else None
