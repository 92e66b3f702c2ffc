"""Features as somebody would add them: the files and lines that they take, in a copy of ftlevel.

Tests train with them; `scripts/house.py` counts what each touches.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from forked import Forked

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "src/ftlevel"


@dataclass(frozen=True)
class Addition:
    """What one feature takes.

    Attributes:
        files: new file of the package → its text.
        lines: (file of the package, line in it, the line to come after that one).
        test: the test of the feature, which is one more file.
    """

    files: Mapping[str, str]
    lines: Sequence[tuple[str, str, str]] = field(default=())
    test: str = ""

    @property
    def touched(self) -> list[str]:
        """The files that are new or changed, with the test."""
        changed = dict.fromkeys(path for path, _, _ in self.lines)
        return [*self.files, *changed, *filter(None, [self.test])]

    def apply(self, folder: Path) -> Path:
        """Copy ftlevel into `folder`, add the feature there, and return `folder`."""
        shutil.copytree(PACKAGE, folder / "ftlevel")
        for path, text in self.files.items():
            target = folder / "ftlevel" / path
            assert not target.exists(), f"{path} already exists"
            target.write_text(text, encoding="utf-8")
        for path, anchor, line in self.lines:
            target = folder / "ftlevel" / path
            text = target.read_text(encoding="utf-8")
            assert text.count(anchor) == 1, f"{path} has {text.count(anchor)} × {anchor!r}"
            target.write_text(text.replace(anchor, f"{anchor}\n{line}"), encoding="utf-8")
        return folder


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


_LAST_TASK = '"masked-lm": "ftlevel.tasks.mask",'
TARGET = Addition(
    {"tasks/rank.py": _read("rank.py")},
    [("config/tasks.py", _LAST_TASK, '    "rank": "ftlevel.tasks.rank",')],
    "tests/integration/test_add_a_task.py",
)

_SHORT = """    short_row: Annotated[Action, Check("fewer than three tokens")] = Field(
        "warn", description="A row of fewer than three tokens."
    )"""
_LAST_CHECK = '"drop", description="Validation or test row that is also a training row."\n    )'
_TABLE = "TOKEN_CHECKS: dict[str, Callable[[FlatRows, TokenCheckContext], Mask | None]] = {"
CHECK = Addition(
    {},
    [
        ("config/gate.py", _LAST_CHECK, _SHORT),
        (
            "data/gate/checks.py",
            _TABLE,
            '    "short_row": lambda flat, known: flat.ids.lengths < 3,',
        ),
    ],
)

_SEED = '    Flag("train.seed", "", HOW),'
_SAMPLES = '    Flag("data.validation_rows", "", HOW),'
FLAG = Addition({}, [("config/flags.py", _SEED, _SAMPLES)])

_LAST_FORMAT = '    "gguf": ExportFormat("ftlevel.merging.formats.gguf", ".gguf", (".Modelfile",)),'
EXPORT = Addition(
    {"merging/formats/names.py": _read("names.py")},
    [
        (
            "config/export.py",
            _LAST_FORMAT,
            '    "names": ExportFormat("ftlevel.merging.formats.names", ".names"),',
        )
    ],
)

_LAST_READER = '    ".parquet": ParquetReader,'
DATA_FORMAT = Addition(
    {"data/sources/readers/key_value.py": _read("key_value.py")},
    [
        ("data/sources/readers/__init__.py", _LAST_READER, '    ".kv": KeyValue,'),
        (
            "data/sources/readers/__init__.py",
            "from ftlevel.data.sources.readers.json import JsonLinesReader, JsonReader",
            "from ftlevel.data.sources.readers.key_value import KeyValue",
        ),
    ],
)

PAGE = (HERE.parents[1] / "docs/add-a-method.md").read_text(encoding="utf-8")
_FILE = re.compile(r"^`src/ftlevel/([\w/.]+)`(?:(?!^`src).)*?^```python\n(.*?)^```", re.M | re.S)
_DIFF = re.compile(r"^```diff\n (.*)\n\+(.*)\n```", re.M)
METHOD = Addition(
    dict(_FILE.findall(PAGE)),
    [("config/methods/__init__.py", before, added) for before, added in _DIFF.findall(PAGE)],
)
"""The method that docs/add-a-method.md shows."""

_A_FAMILY = '  "granite": {"like": "llama", "heads": {"text-generation": ["lm_head"]}},'
FAMILY = Addition({}, [("models/families.json", _A_FAMILY, '  "stablelm": {"like": "llama"},')])

ADDITIONS: dict[str, tuple[str, int, Addition]] = {
    "a kind of target, with its tests": ("~22", 3, TARGET),
    "a PEFT method": ("6", 3, METHOD),
    "a family of models": ("1", 1, FAMILY),
    "a data format": ("2–4", 2, DATA_FORMAT),
    "an export format": ("≥ 5", 2, EXPORT),
    "a flag": ("3–4", 1, FLAG),
    "a check of the gate": ("4", 2, CHECK),
}
"""Feature → how many files it took in 0.1.0, how many it may take, and what it takes."""


def _run_commands() -> None:
    """Run a command for each line of stdin."""
    from ftlevel.cli.app import run

    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        cwd, arguments = json.loads(line)
        os.chdir(cwd)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(arguments)
        print(json.dumps([code, out.getvalue(), err.getvalue()]), file=answers, flush=True)


@lru_cache(maxsize=1)  # one that is dropped reads the end of its commands
def _start(tree: Path) -> Forked:
    """Start a process that imports the ftlevel of `tree` once and runs commands."""
    return Forked(
        call=(_run_commands, ()), imported="libraries",
        env={**os.environ, "PYTHONPATH": str(tree)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def run(tree: Path, *arguments: Any, cwd: Path, code: int = 0) -> str:
    """Run the ftlevel of `tree` and return what it prints.

    Args:
        tree: what `Addition.apply` returned.
        arguments: of the command line.
        cwd: where it is run.
        code: the exit code that is expected.
    """
    process = _start(tree)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([str(cwd), [*map(str, arguments)]]) + "\n")
    process.stdin.flush()
    found, out, err = json.loads(process.stdout.readline())
    assert found == code, err or out
    return str(out if code == 0 else err)
