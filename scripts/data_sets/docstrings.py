"""docstring-summary: the body of a docstring, and its first line as the summary.

From the documentation of six BSD-licensed libraries. A file of code is in one split only.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from data_sets.sources import Sources
from data_sets.splits import Row, Splits, split_rows, squeeze
from wheels import Package

# One platform's wheels on every machine, so that files are equal; only .py files are read.
_LINUX = "cp311"
LIBRARIES = (
    Package(
        "numpy",
        "2.4.6",
        "89cd468399cfd2504718f0ba50e410dca55a170b61a02ad92bb18c8a65186e93",
        abi=_LINUX,
    ),
    Package(
        "pandas",
        "3.1.1",
        "4f1602f614bb83f443381dbcbb94c4ac764b2e50c8d6c965614c5cd83e328c47",
        abi=_LINUX,
    ),
    Package(
        "scipy",
        "1.17.1",
        "43af8d1f3bea642559019edfe64e9b11192a8978efbd1539d7bc2aaa23d92de4",
        abi=_LINUX,
    ),
    Package(
        "scikit-learn",
        "1.9.1",
        "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
        abi=_LINUX,
    ),
    Package(
        "networkx",
        "3.6.1",
        "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
    ),
    Package(
        "sympy",
        "1.14.0",
        "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    ),
)
MODULES = ("numpy", "pandas", "scipy", "sklearn", "networkx", "sympy")

NOT_DOCUMENTATION = re.compile(
    r"(^|/)(tests?|_?externals?|vendored|conftest|setup|benchmarks|array_api_compat|_lib)(/|\.|$)"
)
HEADING = re.compile(
    r"^\s*(Parameters|Returns?|Attributes|Examples?|Notes|References|See Also|Raises|Yields"
    r"|Warnings?|Explanation|Methods|Other Parameters)\s*\n\s*[-=]{3,}",
    re.MULTILINE,
)
NOT_PROSE = re.compile(
    r">>>|::\s*$|^\s*(\.\.|[-*|+] |\[\d)|[-=]{4}|:math:|\\[a-z]+\{", re.MULTILINE
)
ROLE = re.compile(r":[a-z:]+:`~?([^`<]+?)(?: <[^>]*>)?`")


@dataclass(frozen=True)
class Docstring:
    """A documented function or class of a library."""

    library: str
    file: str
    name: str
    text: str


def documented(library: str, file: str, code: str) -> Iterator[Docstring]:
    """Yield the public functions and classes of a file that have a docstring; outer ones first."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            text = ast.get_docstring(node)
            if text:
                yield Docstring(library, file, node.name, text)


def plain(text: str) -> str:
    """Return `text` on one line, with the roles of reStructuredText as plain code marks."""
    return squeeze(ROLE.sub(r"`\1`", text))


def divide(docstring: str) -> tuple[str, str]:
    """Return the first paragraph of a docstring and the prose of the rest.

    Prose is the text before the first section, and Notes and Explanation; paragraphs with code,
    lists, tables or formulas are excluded.
    """
    first, _, rest = docstring.partition("\n\n")
    pieces = HEADING.split(rest)
    texts = [pieces[0]]
    for title, text in zip(pieces[1::2], pieces[2::2], strict=True):
        if title in ("Notes", "Explanation"):
            texts.append(text)
    paragraphs = [
        plain(paragraph)
        for paragraph in re.split(r"\n\s*\n", "\n\n".join(texts))
        if not NOT_PROSE.search(paragraph)
    ]
    return plain(squeeze(first)), " ".join(text for text in paragraphs if len(text) > 30)


def is_good(summary: str, document: str) -> bool:
    """Return whether the pair is usable: summary and document of suitable length, plain prose."""
    return (
        20 <= len(summary) <= 120
        and 150 <= len(document) <= 1200
        and "deprecated" not in document.lower()[:80]
        and "\\" not in document
        and not summary.endswith(":")
        and document[0].isalpha()
    )


def drop_templated(rows: Iterable[Row]) -> list[Row]:
    """Drop rows whose text starts like an earlier one's, or whose summary is the same."""
    seen: set[str] = set()
    unique = []
    for row in rows:
        marks = {row["document"][:200], row["summary"]}
        if not marks & seen:
            seen |= marks
            unique.append(row)
    return unique


def build_rows(docstrings: Iterable[Docstring]) -> Iterator[Row]:
    """Yield a row for every docstring with a usable summary and body."""
    for item in docstrings:
        summary, document = divide(item.text)
        if is_good(summary, document):
            yield {
                "library": item.library,
                "file": item.file,
                "name": item.name,
                "document": document,
                "summary": summary.rstrip(".") + ".",
            }


def read_libraries(sources: Sources) -> Iterator[Docstring]:
    """Yield the docstrings of all libraries, in the order of their files."""
    for package, module in zip(LIBRARIES, MODULES, strict=True):
        for file, code in sources.members(package, rf"{module}/.*\.py"):
            if not NOT_DOCUMENTATION.search(file):
                yield from documented(module, file, code)


def build_summaries(name: str, sources: Sources) -> Splits:
    """Build docstring-summary."""
    rows = drop_templated(build_rows(read_libraries(sources)))
    return split_rows(
        name,
        rows,
        (1200, 150, 150),
        key=lambda row: str(row["document"]),
        group=lambda row: str(row["file"]),
    )
