"""Every planted fault of scripts/mutants.yaml has one place in the package, and its tests exist."""

from __future__ import annotations

from pathlib import Path

import mutants

ROOMS = {"data", "gate", "encoding", "fast", "methods", "weights", "merging", "evaluation", "tasks",
         "trained", "training", "config", "cli", "artifacts", "commands"}  # fmt: skip


def fits(mutant: mutants.Mutant, sources: dict[Path, str]) -> bool:
    """Whether the old text occurs once and the tests exist."""
    try:
        mutants.find_module(mutant, sources)
    except ValueError:
        return False
    for test in mutant.tests:
        path, _, name = test.partition("::")
        file = mutants.ROOT / path
        if not file.is_file() or f"def {name.partition('[')[0]}" not in file.read_text("utf-8"):
            return False
    return mutant.old != mutant.new


def test_every_mutant_has_one_place_and_tests() -> None:
    sources = mutants.read_sources(mutants.ROOT / "src")
    listed = mutants.read_mutants()
    assert [mutant for mutant in listed if not fits(mutant, sources)] == []
    assert len(listed) >= 60
    assert {mutant.room for mutant in listed} >= ROOMS
