"""wordnet-define and wordnet-supersense: glosses, examples and categories of WordNet 3.0."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from data_sets.sources import Sources
from data_sets.splits import Row, Splits, balance, split_rows, squeeze

DEB = "wordnet-base"

# Numbers of WordNet's lexicographer files (lexnames(5WN)); eight clearly distinct ones.
SUPERSENSES = {
    5: "animal",
    6: "artifact",
    8: "body",
    13: "food",
    15: "location",
    18: "person",
    20: "plant",
    27: "substance",
}
PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}


@dataclass(frozen=True)
class Synset:
    """One meaning: the number of its category, its words, its gloss and its example sentences."""

    category: int
    words: list[str]
    gloss: str
    examples: list[str]


def parse_synsets(lines: Iterable[str]) -> Iterator[Synset]:
    """Yield the synsets of a WordNet data file, wndb(5WN); licence lines begin with a space."""
    for line in lines:
        if line.startswith(" "):
            continue
        head, gloss = line.rstrip("\n").split(" | ", 1)
        fields = head.split()
        count = int(fields[3], 16)
        yield Synset(
            category=int(fields[1]),
            words=[fields[4 + 2 * index].replace("_", " ") for index in range(count)],
            gloss=squeeze(re.split(r';\s*"', gloss)[0].strip(" ;")),
            examples=re.findall(r'"([^"]+)"', gloss),
        )


def define_rows(synsets: Iterable[Synset], part_of_speech: str) -> Iterator[Row]:
    """Yield a row for every synset with an example sentence that contains its first word."""
    for synset in synsets:
        word = re.sub(r"\(.*\)", "", synset.words[0])
        if not synset.examples or not 25 <= len(synset.gloss) <= 200:
            continue
        example = synset.examples[0]
        if len(example) > 15 and word.lower() in example.lower():
            yield {
                "instruction": f'Define the {part_of_speech} "{word}" '
                "as it is used in the sentence.",
                "input": example.strip(),
                "output": synset.gloss,
            }


def supersense_rows(synsets: Iterable[Synset]) -> Iterator[Row]:
    """Yield gloss and category of the nouns of the chosen categories."""
    for synset in synsets:
        if synset.category in SUPERSENSES and 30 <= len(synset.gloss) <= 300:
            yield {"text": synset.gloss, "label": SUPERSENSES[synset.category]}


def read_synsets(sources: Sources, part: str) -> Iterator[Synset]:
    """Yield the synsets of one part of speech: noun, verb, adj or adv."""
    path = sources.deb(DEB) / "usr/share/wordnet" / f"data.{part}"
    with path.open(encoding="utf-8") as lines:
        yield from parse_synsets(lines)


def build_define(name: str, sources: Sources) -> Splits:
    """Build wordnet-define."""
    rows = [
        row
        for part, spoken in PARTS_OF_SPEECH.items()
        for row in define_rows(read_synsets(sources, part), spoken)
    ]
    return split_rows(name, rows, (2000, 200, 200))


def build_supersense(name: str, sources: Sources) -> Splits:
    """Build wordnet-supersense: eight balanced classes."""
    rows = balance(supersense_rows(read_synsets(sources, "noun")), "label", 250)
    return split_rows(name, rows, (1600, 200, 200), key=lambda row: str(row["text"]))
