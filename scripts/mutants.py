"""Introduce faults into a copy of the package, one at a time, and run the tests that must fail.

    python scripts/mutants.py                 # all of scripts/mutants.yaml; exit 1 if one survives
    python scripts/mutants.py data fast       # mutants of two packages
    python scripts/mutants.py --match nucleus # mutants with this text in their code

A mutant is a text that occurs once in `src`, its replacement, and tests. Modules can move without
a change to the list. The tests must pass on the unchanged package first.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ["HF_HUB_OFFLINE"] = "1"  # as in the tests; read when the libraries are imported

from forked import Forked  # noqa: E402 - found by the line above

LIST = ROOT / "scripts/mutants.yaml"
TIMEOUT = 600
"""Seconds for the tests of one mutant; an endless loop counts as killed."""


@dataclass(frozen=True)
class Mutant:
    """A fault: `old` occurs once in the package; with `new`, `tests` must fail."""

    room: str
    old: str
    new: str
    tests: tuple[str, ...]


def read_mutants(path: Path = LIST) -> list[Mutant]:
    """Return the mutants of a list: room → entries of `old`, `new` and `tests`."""
    rooms = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [
        Mutant(room, entry["old"], entry["new"], tuple(entry["tests"].split()))
        for room, entries in rooms.items()
        for entry in entries
    ]


def find_module(mutant: Mutant, sources: dict[Path, str]) -> Path:
    """Return the module that contains the old text.

    Raises:
        ValueError: the text does not occur exactly once.
    """
    counts = {path: text.count(mutant.old) for path, text in sources.items()}
    paths = [path for path, count in counts.items() if count]
    if sum(counts.values()) != 1:
        names = ", ".join(str(path) for path in paths) or "no module"
        raise ValueError(f"{mutant.old!r} must occur once, but occurs in {names}")
    return paths[0]


def read_sources(folder: Path) -> dict[Path, str]:
    """Return relative path → text of every module in a directory."""
    return {
        path.relative_to(folder): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.py"))
    }


def run_tests(tests: tuple[str, ...], source: Path, timeout: float = math.inf) -> tuple[bool, str]:
    """Return whether the tests pass with the package of `source`, and the end of their output.

    After `timeout` seconds they count as failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = Forked(
            call=(pytest.main, [["-x", "-q", "-p", "no:cacheprovider", *tests]]),
            imported="libraries", cwd=ROOT, env=environment, stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            return False, "timeout"
        output.seek(0)
        tail = output.read()[-2000:]
    if code not in (0, 1, 2):  # 2: an import failed
        raise RuntimeError(f"pytest {' '.join(tests)}: {tail}")
    return code == 0, tail


def main() -> int:
    """Run the selected mutants; return 1 if one survived or its text was not found, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rooms", nargs="*", help="rooms to run; all if none is given")
    parser.add_argument("--match", default="", help="only mutants with this text in `old`")
    arguments = parser.parse_args()
    selected = [
        mutant
        for mutant in read_mutants()
        if (not arguments.rooms or mutant.room in arguments.rooms) and arguments.match in mutant.old
    ]
    if not selected:
        parser.error("no mutant was selected")
    killed = 0
    with tempfile.TemporaryDirectory(prefix="ftlevel-mutants-") as temporary:
        source = Path(temporary, "src")
        shutil.copytree(ROOT / "src", source)
        sources = read_sources(source)
        modules = {}
        for mutant in selected:
            try:
                modules[mutant] = find_module(mutant, sources)
            except ValueError as error:
                print(f"STALE: {error}")
        tests = tuple(dict.fromkeys(test for mutant in modules for test in mutant.tests))
        passed, output = run_tests(tests, source)
        if not passed:
            print(output, "The tests fail without a mutant.", sep="\n")
            return 1
        for mutant, path in modules.items():
            started = time.monotonic()
            (source / path).write_text(sources[path].replace(mutant.old, mutant.new), "utf-8")
            passed, _ = run_tests(mutant.tests, source, TIMEOUT)
            (source / path).write_text(sources[path], "utf-8")
            killed += not passed
            first = mutant.new.strip().splitlines()[0] if mutant.new.strip() else "(removed)"
            print(
                f"{'SURVIVED' if passed else 'killed  '} {time.monotonic() - started:4.0f} s  "
                f"{path}: {first}", flush=True,
            )  # fmt: skip
    print(f"{killed} of {len(selected)} mutants killed")
    return int(killed < len(selected))


if __name__ == "__main__":
    raise SystemExit(main())
