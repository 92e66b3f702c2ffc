"""Resolve column names given by users, and suggest columns for error messages.

A column may be given by name, number, nested key or several names joined by a plus. Suggestions use
column names and the first rows: the text is the column with the most words, the label the one with
the fewest values, and ids are excluded.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftlevel.data.sources.readers.refused import media_of_name
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


def resolve_column(wish: str, columns: Sequence[str]) -> str | None:
    """Return the column that `wish` refers to, or None.

    An existing name takes precedence. Otherwise `answers.text` is a nested key, `2` the second
    column, `Title+Body` two joined columns, and case is ignored.
    """
    if wish in columns or wish.partition(".")[0] in columns:
        return wish
    if wish.isdecimal() and 0 < int(wish) <= len(columns):
        return columns[int(wish) - 1]
    if "+" in wish:
        parts = [resolve_column(part.strip(), columns) for part in wish.split("+")]
        return "+".join(part for part in parts if part) if all(parts) else None
    return next((column for column in columns if column.lower() == wish.lower()), None)


def column_for_flag(column: str, columns: Sequence[str]) -> str:
    """Return a column as written in a flag: its name, or its number if the name is long."""
    is_known = column in columns and is_long(column)
    return str(columns.index(column) + 1) if is_known else column


def source_columns(column: str, columns: Sequence[str]) -> list[str]:
    """Return the columns read for `column`, an expression returned by `resolve_column`."""
    if column in columns:
        return [column]
    parts = column.split("+") if "+" in column else [column]
    return [part if part in columns else part.partition(".")[0] for part in parts]


def columns_exist(column: str, columns: Sequence[str]) -> bool:
    """Return whether all columns that `column` refers to exist."""
    return all(part in columns for part in source_columns(column, columns))


_ID = re.compile(
    r"(.*[\s_.-])?(id|ids|idx|index|uuid|guid|key|nr|no|number|url|link|date|time|timestamp)|.*[a-z]I[dD]",
    re.IGNORECASE,
)
_FILE = re.compile(r"file(_?name|_?path)?s?", re.I)


def is_id(column: str) -> bool:
    """Return whether a column's name suggests ids, dates or links."""
    return _ID.fullmatch(column.strip()) is not None


def is_media_column(column: str) -> bool:
    """Return whether a column's name suggests images, audio, video or file names."""
    return media_of_name(column) is not None or _FILE.fullmatch(column) is not None


def rank_columns(columns: Sequence[str], role: str, rows: Sequence[Row]) -> list[str]:
    """Return the `columns` whose values are possible for `role`, the most likely first."""
    able = [c for c in columns if not is_id(c) and not is_media_column(c)]
    if not rows:
        return able
    values = {c: [row[c] for row in rows if row.get(c) is not None] for c in able}
    able = [c for c in able if values[c] and all(map(_holder(role), values[c]))]
    if role == "label":
        kinds = {c: len({str(value) for value in values[c]}) for c in able}
        return sorted(able, key=lambda c: (kinds[c] < 2, kinds[c]))
    if role in NON_TEXT_ROLES:
        return able
    words = {c: sum(len(value.split()) for value in values[c]) / len(values[c]) for c in able}
    texts = [c for c in able if words[c] > 1.5] or able
    return sorted(texts, key=lambda c: -words[c])


def _holder(role: str) -> Callable[[Any], bool]:
    """Return a predicate that is true for possible values of `role`."""
    if role in ("messages", "conversations", "spans"):
        return lambda value: isinstance(value, list) and (not value or isinstance(value[0], dict))
    if role in ("tokens", "tags", "tools"):
        return lambda value: isinstance(value, list)
    if role == "answers":
        return lambda value: isinstance(value, dict)
    if role == "label":
        return lambda value: not isinstance(value, dict)
    return lambda value: isinstance(value, str)


def format_map_flags(pairs: Mapping[str, str]) -> str:
    """Return `--map` flags for the shell, quoted where necessary."""
    return " ".join(f"--map {shlex.quote(f'{role}={column}')}" for role, column in pairs.items())


def chosen_roles(names: Mapping[str, str], value: object) -> dict[str, str]:
    """Return the column of each role for training on the chosen answers of a preference dataset."""
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
            f"--task translation: the columns are languages ({_listed(found)}), and the source "
            f"language is not given. Add --source-language {first} --target-language {second}, or "
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
