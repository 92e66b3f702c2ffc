"""rollouts.jsonl of a run directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ftlevel.artifacts.files import write_text
from ftlevel.artifacts.rollouts import read_rollouts
from ftlevel.evaluation.rollouts import Group
from ftlevel.training.processes import Processes

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
