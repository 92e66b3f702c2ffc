"""rollouts.jsonl of a run directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlevel.artifacts.files import write_text
from ftlevel.evaluation.rollouts import Group
from ftlevel.training.processes import Processes

ROLLOUTS = "rollouts.jsonl"
MOST_BYTES = 64_000_000
"""Bytes of rollouts.jsonl up to which all completions of a step are written."""
LONGEST = 4_000
"""Characters of a completion that are written."""


class RolloutFile:
    """Appends the groups of all processes to a file, one line per prompt.

    Beyond `MOST_BYTES`, one group per step is written.
    """

    def __init__(self, path: Path, processes: Processes) -> None:
        self._path, self._processes = path, processes

    def __call__(self, step: int, groups: Sequence[Group]) -> None:
        """Write the groups sampled after `step` optimizer steps."""
        parts = self._processes.exchange([group.to_json() for group in groups])
        if not self._processes.is_first:
            return
        lines = sorted((line for part in parts for line in part), key=lambda line: line["row"])
        if self._path.exists() and self._path.stat().st_size > MOST_BYTES:
            lines = lines[:1]
        with self._path.open("a", encoding="utf-8") as file:
            for line in lines:
                for completion in line["completions"]:
                    completion["text"] = completion["text"][:LONGEST]
                file.write(json.dumps({"step": step + 1, **line}, ensure_ascii=False) + "\n")

    def rewind(self, step: int) -> None:
        """Remove the groups of steps after `step`, which will be sampled again."""
        if self._processes.is_first and self._path.exists():
            kept = [line for line in read_rollouts(self._path) if line["step"] <= step]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
            write_text(self._path, text)


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a rollouts.jsonl; empty if there is none."""
    found = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            found.append(value)
    return found
