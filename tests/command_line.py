"""Commands of ftlevel, run in the process of the test: the fixture `cli`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from typing import Any

import pytest

from ftlevel.cli.app import run
from run_files import write_rows


class Cli:
    """Runs commands and returns what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: object) -> str:
        """Run a command that must succeed; return its stdout."""
        return self.run(*words).out

    def json(self, *words: object) -> Any:
        """Run a command that must succeed; return the JSON object on its stdout."""
        return json.loads(self(*words))

    def fails(self, *words: object, code: int = 2) -> str:
        """Run a command that must end with `code`; return its stderr."""
        return self.run(*words, code=code).err

    def dry_run(self, *words: object, rows: Iterable[object] | None = None) -> tuple[int, str]:
        """Run `train --dry-run`; return its exit code and all that it prints.

        Args:
            words: further words.
            rows: the dataset, written to rows.jsonl.
        """
        data = [] if rows is None else ["--dataset", write_rows("rows.jsonl", rows)]
        code = run(["train", "--dry-run", *map(str, [*data, *words])])
        return code, "".join(self._capsys.readouterr())

    def run(self, *words: object, code: int = 0) -> Any:
        """Run a command that must end with `code`; return its `out` and `err`.

        Args:
            words: of the command line; the first one, and those that begin with `--`, are split at
                spaces, as by a shell.
            code: exit code.
        """
        self._capsys.readouterr()
        arguments: list[str] = []
        for index, word in enumerate(map(str, words)):
            is_line = index == 0 or word.startswith("--")
            arguments += shlex.split(word) if is_line and " " in word else [word]
        assert run(arguments) == code, self._capsys.readouterr().err
        return self._capsys.readouterr()
