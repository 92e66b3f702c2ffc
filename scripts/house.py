"""Measure the structure of the package: files that a feature touches, and package size.

    python scripts/house.py            # print both tables; exit 1 if a figure exceeds its bound
    python scripts/house.py --write    # write the table of features into docs/architecture.md

Features are the toy additions of tests/additions, which tests add to a copy of ftlevel and use.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "ftlevel"
sys.path.insert(0, str(ROOT / "tests"))

from additions.tree import ADDITIONS  # noqa: E402 - found by the line above
from page_parts import DOCS, fill  # noqa: E402

ROW_MODULES = (
    "ftlevel.data.sources.splits",
    "ftlevel.data.prepare.loading",
    "ftlevel.data.formats.examples",
    "ftlevel.data.prepare.encoder",
    "ftlevel.tasks.text",
    "ftlevel.data.encoding.encode",
    "ftlevel.data.encoding.fit",
    "ftlevel.data.gate.gate",
    "ftlevel.data.prepare.dataset",
    "ftlevel.training.trainer",
    "ftlevel.fast.step_collator",
)
"""Modules that process a row of a text task, from its source to a batch."""

LORA_R = {
    "config/flags.py": 'Flag("method.r", "--lora-r"',
    "config/methods/lora.py": "    r: ",
    "cli/flags.py": "build_config(add_flag_layers(layers, inputs, note), note)",
    "config/layers.py": "TrainConfig.model_validate(merged)",
    "cli/train.py": "read_config(inputs)",
    "commands/train.py": "session.prepare(load_training_model)",
    "training/model.py": "apply_method(base, config.method",
    "trained/adapt.py": ".build(method, ",
    "methods/lora/__init__.py": "r=spec.r,",
}
"""File → code that passes on the value of `--lora-r`, from the command line to `LoraConfig`."""


@dataclass(frozen=True)
class Figure:
    """A line of the table: a value and its bound."""

    name: str
    bound: int
    value: int


def crossings() -> int:
    """Return how often a row crosses a package boundary between its source and its batch.

    Raises:
        FileNotFoundError: a module of `ROW_MODULES` does not exist.
    """
    for module in ROW_MODULES:
        path = SOURCE / (module.replace(".", "/") + ".py")
        ast.parse(path.read_text(encoding="utf-8"))
    packages = [module.split(".")[1] for module in ROW_MODULES]
    return sum(one != other for one, other in pairwise(packages))


def files_of_lora_r() -> int:
    """Return the number of files to read to follow `--lora-r` to the layer.

    Raises:
        ValueError: a file does not contain its code.
    """
    for name, code in LORA_R.items():
        if code not in (PACKAGE / name).read_text(encoding="utf-8"):
            raise ValueError(f"{name} has no {code!r}: update LORA_R of scripts/house.py")
    return len(LORA_R)


def code_lines(text: str) -> tuple[int, int]:
    """Return the code lines and the docstring lines of a module.

    Code lines exclude blank lines, comments, docstrings and imports.
    """
    tree = ast.parse(text)
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in _NOT_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            code -= _lines_of(node)
        elif isinstance(node, _WITH_DOCSTRING) and ast.get_docstring(node) is not None:
            docstrings |= _lines_of(node.body[0])
    return len(code - docstrings), len(docstrings)


_NOT_CODE = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER, tokenize.ENCODING,
)  # fmt: skip
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _lines_of(node: ast.stmt) -> set[int]:
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def parameter_types(function: ast.FunctionDef) -> str:
    """Return the annotations of a function's parameters as one text."""
    arguments = function.args
    parameters = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    return " ".join(
        ast.unparse(parameter.annotation) for parameter in parameters if parameter.annotation
    )


def count_functions(text: str, pattern: re.Pattern[str]) -> int:
    """Return how many functions of a module have a parameter whose type matches `pattern`."""
    if not _WHOLE_CONFIG.search(text):  # of which every pattern has one
        return 0
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    return sum(bool(pattern.search(parameter_types(function))) for function in functions)


_CONFIGS = r"\b(?:Train|Evaluate|Predict|Generate|Merge|Quantize|Export|CheckServed)Config\b"
_WHOLE_CONFIG = re.compile(_CONFIGS)
_RUN_AND_CONFIG = re.compile(rf"(?=.*\b(?:Run|Plan)\b)(?=.*{_CONFIGS})")
_COMMANDS = (
    "cli/", "commands/", "config/", "extras/compare/", "extras/launch/", "extras/serving/check.py",
    "extras/serving/exporting.py",
)  # fmt: skip


def sizes() -> list[Figure]:
    """Return the size of the package."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    counts = [code_lines(text) for text in texts.values()]
    below = [
        text
        for path, text in texts.items()
        if not path.relative_to(PACKAGE).as_posix().startswith(_COMMANDS)
    ]
    train = ast.parse(texts[PACKAGE / "commands/train.py"])
    imports = [n for n in train.body if isinstance(n, ast.ImportFrom) and n.module]
    tool_lines = sum(
        len(path.read_text(encoding="utf-8").splitlines())
        for folder in ("benchmarks", "scripts")
        for path in (ROOT / folder).rglob("*.py")
    )
    return [
        Figure("Python files", 321, len(texts)),
        Figure("code lines", 52_750, sum(code for code, _ in counts)),
        Figure("docstring lines", 8_999, sum(lines for _, lines in counts)),
        Figure("`# fmt: skip`", 21, sum(t.count("# fmt: skip") for t in texts.values())),
        Figure("lines of benchmarks and scripts", 8_882, tool_lines),
        Figure(
            "functions that take a Run and a whole configuration", 0,
            sum(count_functions(text, _RUN_AND_CONFIG) for text in texts.values()),
        ),
        Figure(
            "functions below commands that take a whole configuration", 18,
            sum(count_functions(text, _WHOLE_CONFIG) for text in below),
        ),
        Figure(
            "imports of ftlevel at the top of commands/train.py", 12,
            sum((n.module or "").startswith("ftlevel") for n in imports),
        ),
    ]  # fmt: skip


def figures() -> list[Figure]:
    """Return the number of files per feature: the table of docs/architecture.md."""
    additions = [
        Figure(f"files changed for {name}", bound, len(addition.touched))
        for name, (bound, addition) in ADDITIONS.items()
    ]
    return [
        *additions,
        Figure("package boundaries that a data row crosses", 4, crossings()),
        Figure("files to read to follow `--lora-r` to the layer", 9, files_of_lora_r()),
    ]


def table(rows: list[Figure]) -> str:
    """Return the figures as a Markdown table."""
    lines = ["| | at most | now |", "|---|--:|--:|"]
    lines += [f"| {f.name} | {f.bound:,} | {f.value:,} |" for f in rows]
    return "\n".join(lines)


def page() -> str:
    """Return docs/architecture.md with the table of features."""
    return fill("architecture", {"figures": table(figures())})


def main() -> None:
    """Print both tables; exit 1 if a figure exceeds its bound."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="update docs/architecture.md")
    arguments = parser.parse_args()
    features, measured = figures(), sizes()
    print(f"{table(features)}\n\n{table(measured)}")
    if arguments.write:
        (DOCS / "architecture.md").write_text(page(), encoding="utf-8")
    grown = [figure for figure in (*features, *measured) if figure.value > figure.bound]
    for figure in grown:
        print(f"{figure.name}: {figure.value:,}, at most {figure.bound:,} allowed")
    if grown:
        sys.exit(1)


if __name__ == "__main__":
    main()
