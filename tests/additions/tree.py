"""Features as somebody would add them: the files and lines that they take, in a copy of ftlevel.

Tests train with them; `scripts/house.py` counts what each touches.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "src/ftlevel"


@dataclass(frozen=True)
class Addition:
    """What one feature takes.

    Attributes:
        files: new file of the package → the file beside this one that is put there.
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
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, folder / "ftlevel", ignore=ignored)
        for path, source in self.files.items():
            target = folder / "ftlevel" / path
            assert not target.exists(), f"{path} is there already"
            shutil.copyfile(HERE / source, target)
        for path, anchor, line in self.lines:
            target = folder / "ftlevel" / path
            text = target.read_text(encoding="utf-8")
            assert text.count(anchor) == 1, f"{path} has {text.count(anchor)} × {anchor!r}"
            target.write_text(text.replace(anchor, f"{anchor}\n{line}"), encoding="utf-8")
        return folder


_LAST_TASK = '"masked-lm": "ftlevel.tasks.mask",'
TARGET = Addition(
    {"tasks/rank.py": "rank.py"},
    [("config/tasks.py", _LAST_TASK, '    "rank": "ftlevel.tasks.rank",')],
    "tests/integration/test_add_a_task.py",
)

_SHORT = """    short_row: Annotated[Action, Check("fewer than three tokens")] = Field(
        "warn", description="A row of fewer than three tokens."
    )"""
_LAST_CHECK = '"drop", description="A validation or test row that is also a training row."\n    )'
_TABLE = "TOKEN_CHECKS: dict[str, Callable[[Flat, Known], Mask | None]] = {"
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
_DECAY = '    Flag("train.weight_decay", "", HOW),'
FLAG = Addition({}, [("config/flags.py", _SEED, _DECAY)])


def run(tree: Path, *arguments: Any, cwd: Path, code: int = 0) -> str:
    """Run the ftlevel of `tree` and return what it prints.

    Args:
        tree: what `Addition.apply` returned.
        arguments: of the command line.
        cwd: where it is run.
        code: the exit code that is expected.
    """
    command = [sys.executable, "-m", "ftlevel", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr or done.stdout
    return done.stdout if code == 0 else done.stderr
