"""The core does not ask what task, objective or method a run has: it calls their methods."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src/ftlevel"
OWN = ("tasks/", "extras/", "methods/", "config/methods/", "objectives.py")
"""Where tasks, objectives and methods are defined."""

ALLOWED: dict[str, int] = {
    "commands/init.py": 1,
    "evaluation/scoring.py": 1,
    "trained/model_ref.py": 1,
    "trained/resolve.py": 2,
}
"""File → number of questions that are left. It may only shrink."""

_CLASSES = re.compile(
    r"\w*Objective|Tokens|Embeddings|Ranking|PolicyGradient|Preferences|EncodedTexts|RankedRow"
)
_SUBJECTS = re.compile(r"(\w+\.)*(task|method)(\.name|\.kind)?|(\w+\.)*card\.task")
_NAMES = re.compile(r"""['"][a-z-]+['"]|_?[A-Z_]*(TASKS?|_PROMPT|ENCODERS)|owner""")


def find_questions(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields `isinstance` of objectives and rows, and comparisons of tasks or methods by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            names = re.findall(r"\w+", ast.unparse(node.args[1]))
            if any(_CLASSES.fullmatch(name) for name in names):
                yield node
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
            parts = re.findall(r"""['"][^'"]+['"]|\w+""", right)
            if _SUBJECTS.fullmatch(left) and any(_NAMES.fullmatch(part) for part in parts):
                yield node


def count_questions(source: Path) -> dict[str, int]:
    files = {path.relative_to(source).as_posix(): path for path in source.rglob("*.py")}
    counts = Counter(
        {
            name: sum(1 for _ in find_questions(ast.parse(path.read_text(encoding="utf-8"))))
            for name, path in files.items()
            if not name.startswith(OWN)
        }
    )
    return dict(sorted((+counts).items()))


def test_core_asks_no_more_questions_about_tasks_objectives_and_methods():
    assert count_questions(SOURCE) == ALLOWED


def test_questions_are_found():
    text = (
        "isinstance(a, Embeddings | Ranking); config.task in TASKS; method.kind == 'qlora'; b == 1"
    )
    assert len(list(find_questions(ast.parse(text)))) == 3
