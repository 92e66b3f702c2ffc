"""Features as a contributor would add them to a copy of ftlevel: their files and lines.

Tests train with them; `scripts/house.py` counts the changed files of each.
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
    """The changes for one feature.

    Attributes:
        files: path of a new file in the package → its text.
        lines: (file of the package, existing line, line to insert after it).
        test: file with the test of the feature.
    """

    files: Mapping[str, str]
    lines: Sequence[tuple[str, str, str]] = field(default=())
    test: str = ""

    @property
    def touched(self) -> list[str]:
        """New and changed files, with the test."""
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


_TASK_ANCHOR = '"masked-lm": "ftlevel.tasks.mask",'
TASK = Addition(
    {"tasks/rank.py": _read("rank.py")},
    [("config/tasks.py", _TASK_ANCHOR, '    "rank": "ftlevel.tasks.rank",')],
    "tests/integration/test_add_a_task.py",
)

_SHORT = """    short_row: Annotated[Action, Check("fewer than three tokens")] = Field(
        "warn", description="A row of fewer than three tokens."
    )"""
_CHECK_ANCHOR = '"drop", description="Validation or test row that is also a training row."\n    )'
_TABLE = "TOKEN_CHECKS: dict[str, Callable[[FlatRows, TokenCheckContext], Mask | None]] = {"
CHECK = Addition(
    {},
    [
        ("config/gate.py", _CHECK_ANCHOR, _SHORT),
        (
            "data/gate/checks.py",
            _TABLE,
            '    "short_row": lambda flat, known: flat.ids.lengths < 3,',
        ),
    ],
)

_SEED = '    Flag("train.seed", "", HOW),'
_SAMPLES = '    Flag("train.max_generate_samples", "", HOW),'
FLAG = Addition({}, [("config/flags.py", _SEED, _SAMPLES)])

_FORMAT_ANCHOR = (
    '        "gguf": ExportFormat("ftlevel.extras.serving.gguf", ".gguf", (".Modelfile",)),'
)
EXPORT = Addition(
    {"extras/serving/names.py": _read("names.py")},
    [
        (
            "extras/serving/__init__.py",
            _FORMAT_ANCHOR,
            '        "names": ExportFormat("ftlevel.extras.serving.names", ".names"),',
        )
    ],
)

_READER_ANCHOR = '    ".parquet": ParquetReader,'
DATA_FORMAT = Addition(
    {"data/sources/readers/key_value.py": _read("key_value.py")},
    [
        ("data/sources/readers/__init__.py", _READER_ANCHOR, '    ".kv": KeyValue,'),
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
"""The method of docs/add-a-method.md."""

_FAMILY_ANCHOR = '  "granite": {"like": "llama", "heads": {"text-generation": ["lm_head"]}},'
FAMILY = Addition(
    {}, [("models/families.json", _FAMILY_ANCHOR, '  "stablelm": {"like": "llama"},')]
)

ADDITIONS: dict[str, tuple[int, Addition]] = {
    "a kind of target, with its tests": (3, TASK),
    "a PEFT method": (3, METHOD),
    "a family of models": (1, FAMILY),
    "a data format": (2, DATA_FORMAT),
    "an export format": (2, EXPORT),
    "a flag": (1, FLAG),
    "a check of the gate": (2, CHECK),
}
"""Feature → largest allowed number of files, changes."""


def _run_commands() -> None:
    """Run a command for each line of stdin."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "ftlevel"]:
        del sys.modules[name]  # of another tree: `forked` imports `safe_io`
    from ftlevel.cli.app import run

    output, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        cwd, arguments = json.loads(line)
        os.chdir(cwd)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(arguments)
        print(json.dumps([code, out.getvalue(), err.getvalue()]), file=output, flush=True)


@lru_cache(maxsize=1)  # a dropped process reads EOF and ends
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
        tree: directory returned by `Addition.apply`.
        arguments: of the command line.
        cwd: working directory.
        code: expected exit code.
    """
    process = _start(tree)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([str(cwd), [*map(str, arguments)]]) + "\n")
    process.stdin.flush()
    exit_code, out, err = json.loads(process.stdout.readline())
    assert exit_code == code, err or out
    return str(out if code == 0 else err)
