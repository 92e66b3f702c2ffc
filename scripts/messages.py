"""Errors and warnings in the sources, by topic: the sections of docs/troubleshooting.md list them.

python scripts/messages.py          print topic, file and line, and text of each
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ftlevel.cli.topics import topic_of_module

SOURCES = Path(__file__).resolve().parents[1] / "src"


@dataclass(frozen=True)
class Message:
    """An error or warning; `text` has an ellipsis for each value, and is empty if computed."""

    topic: str | None
    where: str
    text: str


def messages(sources: Path = SOURCES) -> Iterator[Message]:
    """Yield each message that `raise` or `warn` shows to a user, in the order of the files."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in _files(sources)}
    errors = _user_errors(trees.values())
    for path, tree in trees.items():
        names = path.relative_to(sources).with_suffix("").parts
        topic = topic_of_module(".".join(names).removesuffix(".__init__"))
        for call in _calls(tree, errors):
            where = f"{path.relative_to(sources.parent)}:{call.lineno}"
            yield Message(topic, where, _text(call.args[0]) if call.args else "")


def _files(sources: Path) -> list[Path]:
    return sorted(sources.rglob("*.py"))


def _user_errors(trees: Iterable[ast.Module]) -> set[str]:
    """Return the names of FtlevelError, of the error of a bad row, and of derived classes."""
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    names = {"FtlevelError", "UnusableRowError"}
    while derived := {
        node.name
        for node in classes
        if node.name not in names and any(_name(base) in names for base in node.bases)
    }:
        names |= derived
    return names - {"Interrupted"}


def _calls(tree: ast.Module, errors: set[str]) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if _name(node.exc.func) in errors:
                yield node.exc
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            receiver = ast.unparse(node.func.value)
            if node.func.attr == "warn" and receiver not in ("self", "warnings"):
                yield node


def _name(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def _text(node: ast.expr) -> str:
    """Return the fixed text of a message, with an ellipsis for each value."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.FormattedValue):
        return "…"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return ""


if __name__ == "__main__":
    for message in messages():
        print(f"[{message.topic}] {message.where}: {message.text}")
