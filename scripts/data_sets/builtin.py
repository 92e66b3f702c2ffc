"""builtin:docstrings, a file of the package: documented code of Python 3.11's standard library.

No module and no docstring is in two splits. Rows are ordered by the SHA-1 of the module's path, and
a module has at most 16, so that the first rows are from many modules.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from hashlib import sha1
from pathlib import Path
from typing import NamedTuple

from data_sets.splits import Row, squeeze

SPLITS = {"validation": range(86, 93), "test": range(93, 100), "train": range(86)}
FILE = Path(__file__).resolve().parents[2] / "src/ftlevel/data/builtin/docstrings.jsonl"
MAX_CHARACTERS = 1200  # of a row
# Tests, vendored projects, programs and generated tables have no useful docstrings.
_SKIPPED = """__pycache__ dist-packages encodings ensurepip idlelib idle_test lib-dynload lib2to3
    pydoc_data site-packages test tests turtledemo""".split()
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")  # these differ between builds of Python
_NOT_PROSE = re.compile(r"\s+\S|>>>|[-=+*|:#.@~]|\w+\s+--?\s|\w+:\s*$|\w+\(")
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class Documented(NamedTuple):
    """A documented object; `source` is a function's code without docstring, or ""."""

    kind: str
    source: str
    docstring: str


def _hash_of(text: str) -> str:
    return sha1(squeeze(text).lower().encode(), usedforsecurity=False).hexdigest()


def find_modules(library: Path) -> list[tuple[str, str]]:
    """Return (split, relative path) of the modules, ordered by hash."""
    paths = []
    for folder, names, files in os.walk(library):
        names[:] = [n for n in names if n not in _SKIPPED and not n.startswith(_SKIPPED_PREFIXES)]
        kept = [f for f in files if f.endswith(".py") and not f.startswith(_SKIPPED_PREFIXES)]
        paths += [Path(folder, name).relative_to(library).as_posix() for name in kept]
    hashes = {path: sha1(path.encode(), usedforsecurity=False).hexdigest() for path in paths}
    return [
        (next(name for name, share in SPLITS.items() if int(hashes[path], 16) % 100 in share), path)
        for path in sorted(paths, key=hashes.__getitem__)
    ]


def read_module(text: str) -> Iterator[Documented]:
    """Yield the documented module, classes and functions in the source order."""
    lines, pending = text.split("\n"), [ast.parse(text)]  # ast does not split at a form feed
    while pending:
        node = pending.pop()
        for block in ("handlers", "finalbody", "orelse", "body"):
            pending += reversed(getattr(node, block, None) or ())
        if not isinstance(node, _Function | ast.ClassDef | ast.Module):
            continue
        if docstring := (ast.get_docstring(node) or "").strip():
            kind = type(node).__name__.removeprefix("Async").removesuffix("Def").lower()
            source = _remove_docstring(node, lines) if isinstance(node, _Function) else ""
            yield Documented(kind, source, docstring)


def _remove_docstring(node: _Function, lines: list[str]) -> str:
    """Return a function's dedented source without docstring; "" if that cannot be cut out."""
    docstring, end = node.body[0], node.body[0].end_lineno
    if len(node.body) < 2 or end is None or end >= node.body[1].lineno:
        return ""
    first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
    head, body = lines[first - 1 : docstring.lineno - 1], lines[end : node.end_lineno]
    while body and not body[0].strip():
        del body[0]
    indent = " " * node.col_offset
    if not (head and head[-1].strip()) or any(
        line.strip() and not line.startswith(indent) for line in (*head, *body)
    ):  # a multi-line string may be indented less than the function
        return ""
    return textwrap.dedent("\n".join([*head, *body])).strip()


def _make_signature(item: Documented) -> Row | None:
    function = ast.parse(item.source).body[0] if item.source else None
    if not isinstance(function, ast.FunctionDef) or function.name.startswith("__"):
        return None
    own = function.args
    names = [a.arg for a in (*own.posonlyargs, *own.args, *own.kwonlyargs)]
    parameters = [name for name in names if name not in ("self", "cls")]
    header = f"def {function.name}({ast.unparse(own)}):\n    {_first_line(item).strip()}"
    prompt = f"Describe this Python function as JSON.\n\n{header}"
    if not parameters or len(prompt) > 500:
        return None
    answer = json.dumps({"name": function.name, "parameters": parameters})
    return {"prompt": prompt, "completion": answer}


def _make_explanation(item: Documented) -> Row | None:
    prompt = f"Explain this Python function.\n\n{item.source}"
    total = len(prompt) + len(item.docstring)
    is_good = item.source and len(item.docstring) >= 24 and item.docstring not in prompt
    # Outside of this share, the docstring is too long or too short to explain the code.
    if not is_good or total > MAX_CHARACTERS or not 0.3 <= len(prompt) / total <= 0.8:
        return None
    return {"prompt": prompt, "completion": item.docstring}


def _make_summary(item: Documented) -> Row | None:
    summary, _, rest = item.docstring.partition("\n\n")
    paragraphs, room = [], MAX_CHARACTERS - 120
    for paragraph in rest.split("\n\n"):
        lines = paragraph.strip("\n").splitlines()
        if lines and not any(map(_NOT_PROSE.match, lines)):
            prose = squeeze(" ".join(lines))
            room -= len(prose) + 1
            if room < 0:
                break
            paragraphs += [prose] * bool(prose)
    document = "\n".join(paragraphs)
    is_line = "\n" not in summary and 16 <= len(summary) <= 120 and "->" not in summary
    is_sentence = is_line and len(summary.split()) > 2 and summary[0].isalpha()
    is_repeated = summary.rstrip(".").lower() in document.lower()
    if not is_sentence or is_repeated or len(document) < 100:
        return None
    return {"document": document, "summary": summary}


def _first_line(item: Documented) -> str:
    return item.docstring.partition("\n")[0]


_KINDS: dict[str, tuple[Callable[[Documented], Row | None], Callable[[Documented], str]]] = {
    "signatures": (_make_signature, _first_line),
    "generation": (_make_explanation, lambda item: item.docstring),
    "summarization": (_make_summary, lambda item: item.docstring),
}


def build_rows(library: Path) -> Iterator[Row]:
    """Yield the rows of all kinds and splits, and the documentation of the test split as texts."""
    modules: dict[str, list[list[Documented]]] = {split: [] for split in SPLITS}
    for split, path in find_modules(library):
        modules[split].append([*read_module((library / path).read_text(encoding="utf-8"))])
    for kind, (make, key) in _KINDS.items():
        seen: set[str] = set()
        for split in SPLITS:
            for items in modules[split]:
                rows: dict[str, Row] = {}
                for item in items:
                    row, name = make(item), _hash_of(key(item))
                    if row and name not in seen and "".join(map(str, row.values())).isascii():
                        seen.add(name)
                        rows[name] = row
                for name in sorted(rows)[:16]:
                    yield {"kind": kind, "split": split, **rows[name]}
            seen |= {_hash_of(key(item)) for items in modules[split] for item in items}
    for item in (item for items in modules["test"] for item in items):
        yield {"kind": "documentation", "split": "test", "text": item.docstring}


def write_rows(file: Path = FILE) -> int:
    """Write the rows of this Python's standard library to `file`; return their number."""
    rows = [*build_rows(Path(sysconfig.get_path("stdlib")))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)
