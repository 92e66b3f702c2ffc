"""Built-in dataset `builtin:docstrings`: documented code of Python's standard library.

Rows are extracted at run time from the installed source files; nothing is downloaded. The path of a
module determines its split. This module must not import torch or datasets.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from ftlevel.errors import InputError, join_names

Kind = Literal["signatures", "generation", "summarization"]
Split = Literal["train", "validation", "test"]
Row = dict[str, str]

INSTRUCTION = "Explain this Python function.\n\n"
SIGNATURE_INSTRUCTION = "Describe this Python function as JSON.\n\n"

# About 400 tokens at 3 characters per token: short enough for a tiny model on a CPU.
MAX_ROW_CHARACTERS = 1200
# Minimum and maximum share of the prompt in a row's characters; outside of them, the docstring is
# too long or too short to explain the code.
PROMPT_RATIO = (0.3, 0.8)
MIN_DOCSTRING_CHARACTERS = 24
MAX_SIGNATURE_CHARACTERS = 500
MIN_DOCUMENT_CHARACTERS = 100
SUMMARY_CHARACTERS = (16, 120)
# Rows are ordered by module; without a limit, one long module could fill a small sample.
MAX_ROWS_PER_MODULE = 16

# Percentages, compared with a module's hash bucket in this order.
_SHARES: tuple[tuple[Split, int], ...] = (("train", 86), ("validation", 7), ("test", 7))
# A docstring found in several splits belongs to the first one in this order.
_PRECEDENCE: tuple[Split, ...] = ("validation", "test", "train")

# Tests, vendored projects, programs and generated tables have no useful docstrings.
_SKIPPED_DIRECTORIES = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "idle_test",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
# `_sysconfigdata_*` and `config-3.x-*` differ between builds of Python.
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class DocumentedObject:
    """A documented object; `source` omits the docstring, and is "" for modules and classes."""

    kind: Literal["module", "class", "function"]
    source: str
    docstring: str


def load_docstrings(kind: Kind, split: Split, limit: int | None = None) -> list[Row]:
    """Returns up to `limit` rows of one split, in a fixed pseudo-random order.

    No module and no docstring occurs in two splits. Columns by `kind`: `signatures` has `prompt`
    (header and summary line) and `completion` (name and parameters as JSON); `generation` has
    `prompt` (source) and `completion` (docstring); `summarization` has `document` (docstring
    without its summary line) and `summary`. Raises `InputError` for an unknown `kind` or `split`,
    and for a Python without source files.
    """
    for name, value, choices in (("kind", kind, get_args(Kind)), ("split", split, get_args(Split))):
        if value not in choices:
            raise InputError(
                f"builtin:docstrings: unknown {name} {value!r}. Available: {join_names(choices)}."
            )
    if limit is not None and limit <= 0:
        return []
    rows, remaining = _cached_rows(kind, split, stdlib_root())
    try:
        rows += islice(remaining, None if limit is None else max(limit - len(rows), 0))
    except BaseException:  # the iterator has ended early
        _cached_rows.cache_clear()
        raise
    return [dict(row) for row in rows[:limit]]


def split_of(module_path: str) -> Split:
    """Returns the split of a module; it depends only on a hash of the path ("json/decoder.py")."""
    bucket = int(hashlib.sha1(module_path.encode(), usedforsecurity=False).hexdigest(), 16) % 100
    for split, share in _SHARES:
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("the shares of the splits do not add up to 100")


def stdlib_modules(split: Split | None = None) -> list[tuple[str, Path]]:
    """Returns (relative path, file) of the modules in `split` (all if None), ordered by hash."""
    directory = stdlib_root()
    return [
        (path, directory / path) for path, part in _sorted_paths(directory) if split in (None, part)
    ]


@lru_cache(maxsize=1)
def _sorted_paths(directory: Path) -> tuple[tuple[str, Split], ...]:
    paths = [path.relative_to(directory).as_posix() for path in _python_files(directory)]
    paths.sort(key=lambda path: hashlib.sha1(path.encode(), usedforsecurity=False).digest())
    return tuple((path, split_of(path)) for path in paths)


def stdlib_root() -> Path:
    """Returns the standard library's directory; raises `InputError` if it has no source files."""
    directory = Path(sysconfig.get_path("stdlib"))
    if not (directory / "argparse.py").is_file():
        raise InputError(
            f"builtin:docstrings reads the source of Python's standard library, and {directory} "
            "has none (this Python was stripped or is packed in a zip). Use a Python that comes "
            "with its source files, or name a file of your own with --dataset."
        )
    return directory


def read_module(file: Path) -> list[DocumentedObject]:
    """Load the objects of a module that have a docstring, in source order; [] if parsing fails."""
    try:
        text = file.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences
            tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError):  # ValueError: not UTF-8, or null bytes
        return []
    lines = text.split("\n")  # unlike splitlines, ast does not split at a form feed
    documented = []
    for node in _scopes(tree):
        docstring = (ast.get_docstring(node) or "").strip()
        if not docstring:
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            source = _undocumented_source(node, lines)
            documented.append(DocumentedObject("function", source, docstring))
        else:
            kind: Any = "module" if isinstance(node, ast.Module) else "class"
            documented.append(DocumentedObject(kind, "", docstring))
    return documented


_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Scope = ast.Module | ast.ClassDef | _Function
# Statements without nested statements, the majority in a module.
_SIMPLE = (ast.Expr, ast.Assign, ast.Return, ast.AugAssign, ast.Raise, ast.Import, ast.ImportFrom)


def _python_files(root: Path) -> Iterator[Path]:
    for directory, names, files in os.walk(root):
        names[:] = set(names) - _SKIPPED_DIRECTORIES
        names[:] = (name for name in names if not name.startswith(_SKIPPED_PREFIXES))
        for name in files:
            if name.endswith(".py") and not name.startswith(_SKIPPED_PREFIXES):
                yield Path(directory, name)


def _scopes(tree: ast.Module) -> Iterator[_Scope]:
    """Yields the module, its classes and its functions; three times faster than `ast.walk`."""
    yield tree
    pending: list[ast.AST] = list(reversed(tree.body))
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node
        elif isinstance(node, _SIMPLE):
            continue
        for block in ("handlers", "finalbody", "orelse", "body"):
            pending.extend(reversed(getattr(node, block, ())))


def _undocumented_source(node: _Function, lines: list[str]) -> str:
    """Returns a function's dedented source without docstring; "" if that cannot be cut out."""
    docstring, end = node.body[0], node.body[0].end_lineno
    if len(node.body) < 2 or end is None or end >= node.body[1].lineno:
        return ""
    first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
    head, body = lines[first - 1 : docstring.lineno - 1], lines[end : node.end_lineno]
    if not head or not head[-1].strip():
        return ""
    while body and not body[0].strip():
        del body[0]
    indent = " " * node.col_offset
    if any(line.strip() and not line.startswith(indent) for line in (*head, *body)):
        return ""  # a multi-line string is indented less than the function
    return textwrap.dedent("\n".join([*head, *body])).strip()


@cache
def _cached_rows(
    kind: Kind,
    split: Split,
    directory: Path,  # noqa: ARG001 - part of the key
) -> tuple[list[Row], Iterator[Row]]:
    """Returns the rows created so far in this process, and an iterator over the next ones."""
    return [], _rows(kind, split)


def _rows(kind: Kind, split: Split) -> Iterator[Row]:
    build = _BUILDERS[kind]

    def key_of(item: DocumentedObject) -> str:
        text = item.docstring
        return _fingerprint(text.partition("\n")[0] if kind == "signatures" else text)

    seen = {
        key_of(item)
        for earlier in _PRECEDENCE[: _PRECEDENCE.index(split)]
        for _, file in stdlib_modules(earlier)
        for item in _documented(file)
    }
    for _, file in stdlib_modules(split):
        rows: dict[str, Row] = {}
        for item in _documented(file):
            key = key_of(item)
            if key not in seen and (row := build(item)) is not None:
                seen.add(key)
                rows[key] = row
        yield from (rows[key] for key in sorted(rows)[:MAX_ROWS_PER_MODULE])


@cache  # parsing 390 files takes half the time of a tiny run
def _documented(file: Path) -> tuple[DocumentedObject, ...]:
    return tuple(read_module(file))


def _fingerprint(docstring: str) -> str:
    text = " ".join(docstring.lower().split())
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def _signature_row(item: DocumentedObject) -> Row | None:
    if not item.source:
        return None
    function = ast.parse(item.source).body[0]
    if not isinstance(function, ast.FunctionDef) or function.name.startswith("__"):
        return None
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    parameters = [name for name in names if name not in ("self", "cls")]
    description = item.docstring.partition("\n")[0].strip()
    signature = f"def {function.name}({ast.unparse(arguments)}):"
    prompt = f"{SIGNATURE_INSTRUCTION}{signature}\n    {description}"
    if not parameters or len(prompt) > MAX_SIGNATURE_CHARACTERS or not prompt.isascii():
        return None
    return {
        "prompt": prompt,
        "completion": json.dumps({"name": function.name, "parameters": parameters}),
    }


def _generation_row(item: DocumentedObject) -> Row | None:
    prompt, completion = INSTRUCTION + item.source, item.docstring
    total = len(prompt) + len(completion)
    if (
        not item.source
        or len(completion) < MIN_DOCSTRING_CHARACTERS
        or total > MAX_ROW_CHARACTERS
        or not PROMPT_RATIO[0] <= len(prompt) / total <= PROMPT_RATIO[1]
        or not (prompt.isascii() and completion.isascii())
        or completion in prompt
    ):
        return None
    return {"prompt": prompt, "completion": completion}


def _summarization_row(item: DocumentedObject) -> Row | None:
    summary, _, rest = item.docstring.partition("\n\n")
    document = _prose(rest)
    low, high = SUMMARY_CHARACTERS
    if (
        "\n" in summary  # the summary spans several lines
        or not low <= len(summary) <= high
        or len(summary.split()) < 3
        or not summary[0].isalpha()
        or "->" in summary  # a signature
        or len(document) < MIN_DOCUMENT_CHARACTERS
        or not (summary.isascii() and document.isascii())
        or summary.rstrip(".").lower() in document.lower()
    ):
        return None
    return {"document": document, "summary": summary}


def _prose(text: str) -> str:
    """Returns the paragraphs of `text` up to the row limit, without code, tables and lists."""
    paragraphs: list[str] = []
    room = MAX_ROW_CHARACTERS - SUMMARY_CHARACTERS[1]
    for paragraph in text.split("\n\n"):
        lines = paragraph.strip("\n").splitlines()
        if not lines or any(_NOT_PROSE.match(line) for line in lines):
            continue
        prose = " ".join(" ".join(lines).split())
        room -= len(prose) + 1
        if room < 0:
            break
        if prose:
            paragraphs.append(prose)
    return "\n".join(paragraphs)


_NOT_PROSE = re.compile(r"\s+\S|>>>|[-=+*|:#.@~]|\w+\s+--?\s|\w+:\s*$|\w+\(")
_BUILDERS: dict[Kind, Callable[[DocumentedObject], Row | None]] = {
    "signatures": _signature_row,
    "generation": _generation_row,
    "summarization": _summarization_row,
}
