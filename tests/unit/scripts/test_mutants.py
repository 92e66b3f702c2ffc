"""The list of planted faults fits the package: each has one place, and its tests exist."""

from __future__ import annotations

from pathlib import Path

import mutants

ROOMS = {"data", "gate", "encoding", "fast", "methods", "weights", "merging", "evaluation", "tasks",
         "trained", "training", "config", "cli", "artifacts", "commands"}  # fmt: skip


def test_every_mutant_has_one_place_and_tests() -> None:
    sources = mutants.read_sources(mutants.ROOT / "src")
    found = mutants.read_mutants()
    for mutant in found:
        mutants.find_module(mutant, sources)
        assert mutant.old != mutant.new
        for test in mutant.tests:
            path, _, name = test.partition("::")
            text = Path(mutants.ROOT, path).read_text(encoding="utf-8")
            assert f"def {name.partition('[')[0]}" in text
    assert len(found) >= 60
    assert {mutant.room for mutant in found} >= ROOMS
