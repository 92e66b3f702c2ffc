"""Resolve column names given by users, and suggest columns for error messages.

A column may be given by name, number, nested key or several names joined by a plus. Suggestions use
column names and the first rows: the text is the column with the most words, the label the one with
the fewest values, and ids are excluded.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftlevel.data.sources.streams import media_of_name
from ftlevel.data.sources.table import Row
from ftlevel.errors import InputError, is_long, join_names

JOINER = "\n\n"
"""Separator between the texts of joined columns: a blank line."""

NON_TEXT_ROLES = frozenset(
    {"label", "tags", "spans", "answers", "messages", "conversations", "tokens", "tools", "id"}
)
"""Roles whose value is not text, so that columns cannot be joined."""

JSON_ROLES = (NON_TEXT_ROLES | {"ranked"}) - {"label", "id"}
"""Roles whose value is a list or an object; a string value is parsed as JSON."""


def resolve_column(name: str, column_names: Sequence[str]) -> str | None:
    """Returns the column that `name` refers to, or None.

    An existing name takes precedence. Otherwise `answers.text` is a nested key, `2` the second
    column, `Title+Body` two joined columns, and case is ignored.
    """
    if name in column_names or name.partition(".")[0] in column_names:
        return name
    if name.isdecimal() and 0 < int(name) <= len(column_names):
        return column_names[int(name) - 1]
    if "+" in name:
        parts = [resolve_column(part.strip(), column_names) for part in name.split("+")]
        return "+".join(part for part in parts if part) if all(parts) else None
    return next((column for column in column_names if column.lower() == name.lower()), None)


def column_for_flag(column: str, column_names: Sequence[str]) -> str:
    """Returns `column` as written in a flag: its name, or if that is long, its 1-based number."""
    use_number = column in column_names and is_long(column)
    return str(column_names.index(column) + 1) if use_number else column


def source_columns(column: str, column_names: Sequence[str]) -> list[str]:
    """Returns the existing columns that make up `column`: a and b for a joined column `a+b`."""
    if column in column_names:
        return [column]
    return [part if part in column_names else part.partition(".")[0] for part in column.split("+")]


def columns_exist(column: str, column_names: Sequence[str]) -> bool:
    """Returns whether all columns that `column` refers to exist."""
    return all(part in column_names for part in source_columns(column, column_names))


_ID = re.compile(
    r"(.*[\s_.-])?(id|ids|idx|index|uuid|guid|key|nr|no|number|url|link|date|time|timestamp)|.*[a-z]I[dD]",
    re.IGNORECASE,
)
_FILE = re.compile(r"file(_?name|_?path)?s?", re.I)


def is_id(column: str) -> bool:
    """Returns whether a column's name suggests ids, dates or links."""
    return _ID.fullmatch(column.strip()) is not None


def is_media_column(column: str) -> bool:
    """Returns whether a column's name suggests images, audio, video or file names."""
    return media_of_name(column) is not None or _FILE.fullmatch(column) is not None


def rank_columns(column_names: Sequence[str], role: str, rows: Sequence[Row]) -> list[str]:
    """Returns the columns whose values in `rows` are possible for `role`, most likely first."""
    usable = [c for c in column_names if not is_id(c) and not is_media_column(c)]
    if not rows:
        return usable
    values = {c: [row[c] for row in rows if row.get(c) is not None] for c in usable}
    usable = [c for c in usable if values[c] and all(_is_possible(role, v) for v in values[c])]
    if role == "label":
        counts = {c: len(set(map(str, values[c]))) for c in usable}
        last_first = usable[::-1]  # the label is often last, and sorting keeps the order of ties
        return sorted(last_first, key=lambda c: (counts[c] < 2, counts[c]))
    if role in NON_TEXT_ROLES:
        return usable
    lengths = {c: sum(len(value.split()) for value in values[c]) / len(values[c]) for c in usable}
    return sorted([c for c in usable if lengths[c] > 1.5] or usable, key=lambda c: -lengths[c])


def _is_possible(role: str, value: Any) -> bool:
    if role in ("messages", "conversations", "spans"):
        return isinstance(value, list) and (not value or isinstance(value[0], dict))
    if role == "label":
        return not isinstance(value, dict)
    types = {"tokens": list, "tags": list, "tools": list, "answers": dict}
    return isinstance(value, types.get(role, str))


def format_map_flags(pairs: Mapping[str, str]) -> str:
    """Returns `pairs` (role → column) as `--map` flags, quoted for the shell where necessary."""
    return " ".join(f"--map {shlex.quote(f'{role}={column}')}" for role, column in pairs.items())


def map_preferred_columns(names: Mapping[str, str], value: object) -> dict[str, str]:
    """Returns role → column for supervised training on chosen answers of a preference dataset.

    `names` maps preference roles to columns; `value`, the first chosen answer, is text or turns.
    """
    if isinstance(value, list):
        users = any(isinstance(t, dict) and t.get("role") == "user" for t in value)
        if users or "prompt" not in names:
            return {"messages": names["chosen"]}
    if "prompt" in names:
        return {"prompt": names["prompt"], "completion": names["chosen"]}
    return {"text": names["chosen"]}


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
    """A natural language; `code` is its ISO 639-1 code, or "" if the name is unknown."""

    name: str
    code: str


def get_language(role: str, column_mapping: Mapping[str, str], name: str | None) -> Language | None:
    """Returns the language `name`; if that is None, the one after which a column is named.

    The column is that of `role` in `column_mapping`. None if it is not named after a language.
    """
    if name is not None:
        return parse_language(name)
    return _find_language(column_mapping.get(role, "").rpartition(".")[2])


def get_language_mapping(column_names: Sequence[str], rows: Sequence[Row]) -> dict[str, str]:
    """Returns language → column, from column names or the keys of `translation`.

    `rows` are a sample, used to list the keys and to distinguish the column `id` from Indonesian.
    """
    paths = {column: column for column in column_names}
    nested = next((c for c in column_names if c.lower() == "translation"), None)
    value = rows[0].get(nested) if nested is not None and rows else None
    if isinstance(value, dict):
        paths = {key: f"{nested}.{key}" for key in value}
    languages: dict[str, str] = {}
    for key, path in paths.items():
        language = _find_language(key)
        is_id = key.lower() == "id" and (len(paths) > 2 or (rows and type(rows[0].get(key)) is int))
        if language is not None and not is_id:
            languages.setdefault(language.name, path)
    return languages


def select_language_mapping(
    languages: Mapping[str, str], source: str | None, target: str | None, mapping: Mapping[str, str]
) -> dict[str, str]:
    """Returns role (source, target) → column, selected by language.

    `languages` is language → column; `mapping` (role → column) takes precedence. Raises
    `InputError` if the direction is ambiguous or a language is missing.
    """
    if not languages or {"source", "target"} <= mapping.keys():
        return {}
    requested = {"source": source, "target": target}
    selected = {role: mapping[role] for role in requested if role in mapping}
    listing = join_names(map(repr, languages.values()))
    for role, language in requested.items():
        column = languages.get(parse_language(language).name) if language else None
        if column is not None:
            selected.setdefault(role, column)
        elif language and len(languages) > 1 and role not in mapping:
            raise InputError(
                f"--{role}-language {language}: there is no such column. Languages: {listing}. "
                f"Name one of them, or the column: --map {role}=COLUMN."
            )
    rest = [column for column in languages.values() if column not in selected.values()]
    missing = [role for role in requested if role not in selected]
    if len(missing) == 1 and len(rest) == 1 and selected:
        return {**selected, missing[0]: rest[0]}
    if missing and len(languages) > 1:
        first, second = (column.rpartition(".")[2] for column in list(languages.values())[:2])
        raise InputError(
            f"--task translation: the columns are languages ({listing}), and the source "
            f"language is not given. Add --source-language {first} --target-language {second}, or "
            "another pair."
        )
    if missing == ["source", "target"] and target is not None and source is None:
        return {"source": rest[0]}  # rows to translate have no target
    return selected


def parse_language(text: str) -> Language:
    """Parse a language code such as `de` or `pt_BR`, or a name; the code is "" if unknown."""
    return _find_language(text) or Language(text, "")


def _find_language(text: str) -> Language | None:
    code = text.replace("_", "-").partition("-")[0].lower()
    if code not in _NAMES or len(text) > 5:
        code = next((code for code, name in _NAMES.items() if name.lower() == text.lower()), "")
    return Language(_NAMES[code], code) if code else None
