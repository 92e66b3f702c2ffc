"""Pairs of a query and its document for embedding models: WordNet, functions, Debian packages."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from data_sets import docstrings, wordnet
from data_sets.sources import Sources
from data_sets.splits import Row, Splits, split_rows, squeeze

SIZES = (2000, 200, 400)
_PACKAGE = re.compile(r"Package: (\S+)\n(?:.*\n)*?Description-en: (.*)\n((?: .*\n)+)")
_TERM = re.compile(r'the \w+ "(.+)" as it is used')


def distinct(rows: Iterable[Row]) -> list[Row]:
    """Return the rows whose anchor and positive occur in no other row."""
    rows = list(rows)
    counts = Counter(text.lower() for row in rows for text in {row["anchor"], row["positive"]})
    return [
        row for row in rows if counts[row["anchor"].lower()] == 1 == counts[row["positive"].lower()]
    ]


def sense_rows(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield a word with a sentence that uses it, and its definition."""
    for row in rows:
        match = _TERM.search(row["instruction"])
        if match:
            yield {"anchor": f"{match[1]}: {row['input']}", "positive": row["output"]}


def code_rows(file: str, code: str) -> Iterator[Row]:
    """Yield the first line of a function's docstring, and its code without the docstring."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        first = docstrings.plain((ast.get_docstring(node) or "").partition("\n\n")[0])
        body = ast.unparse(ast.Module(node.body[1:], [])) if first else ""
        if 20 <= len(first) <= 120 and 80 <= len(body) <= 500:
            yield {"anchor": first, "positive": body, "file": file}


def package_rows(text: str) -> Iterator[Row]:
    """Yield synopsis and first paragraph of a package, from a file Translation-en of Debian."""
    for record in text.split("\n\n"):
        match = _PACKAGE.match(record + "\n")
        if match is None:
            continue
        paragraph = squeeze(re.split(r"\n \.\n", match[3])[0])
        if 15 <= len(match[2]) <= 80 and 80 <= len(paragraph) <= 400:
            yield {"anchor": match[2], "positive": paragraph, "package": match[1].split("-")[0]}


def build_senses(name: str, sources: Sources) -> Splits:
    """Build wordnet-search."""
    rows = [
        row
        for part, spoken in wordnet.PARTS_OF_SPEECH.items()
        for row in sense_rows(wordnet.define_rows(wordnet.read_synsets(sources, part), spoken))
    ]
    return split_rows(name, distinct(rows), SIZES)


def build_code(name: str, sources: Sources) -> Splits:
    """Build docstring-search; a file of code is in one split only."""
    rows = [
        row
        for package, module in zip(docstrings.LIBRARIES, docstrings.MODULES, strict=True)
        for file, code in sources.members(package, rf"{module}/.*\.py")
        if not docstrings.NOT_DOCUMENTATION.search(file)
        for row in code_rows(file, code)
    ]
    return split_rows(name, distinct(rows), SIZES, group=lambda row: str(row["file"]))


def build_packages(name: str, sources: Sources) -> Splits:
    """Build debian-search; packages whose names begin with the same word are in one split only."""
    rows = package_rows(sources.descriptions().read_text(encoding="utf-8"))
    return split_rows(name, distinct(rows), SIZES, group=lambda row: str(row["package"]))
