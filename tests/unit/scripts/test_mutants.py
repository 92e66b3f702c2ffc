"""Mutants of scripts/mutants.yaml: each matches one place in the package and names its tests."""

from __future__ import annotations

from pathlib import Path

import mutants

GROUPS = {"data", "gate", "encoding", "fast", "methods", "weights", "merging", "evaluation",
          "tasks", "trained", "training", "config", "cli", "artifacts", "commands"}  # fmt: skip


def is_valid(mutant: mutants.Mutant, sources: dict[Path, str]) -> bool:
    """Return whether the old text occurs once and the tests exist."""
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


def test_every_mutant_is_valid():
    sources = mutants.read_sources(mutants.ROOT / "src")
    all_mutants = mutants.read_mutants()
    assert [mutant for mutant in all_mutants if not is_valid(mutant, sources)] == []
    assert len(all_mutants) >= 60
    assert {mutant.room for mutant in all_mutants} >= GROUPS
