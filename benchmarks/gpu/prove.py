"""Run the tests that need a GPU; record each that passes, and skip it in a later run.

    python -m gpu.prove tests --out FOLDER --until TIME     (by run.py of the kit)

FOLDER/tests.json maps each test to its outcome, seconds and last words.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

TREE = Path(__file__).resolve().parents[2]
PLACES = ("tests/gpu", "tests/unit/fast/attention/test_varlen.py")


class Notes:
    """A plugin of pytest that keeps outcomes in a file.

    Attributes:
        found: test → outcome, seconds and last words.
        is_cut: whether the time was over before all tests had run.
    """

    def __init__(self, path: Path, earlier: Path | None, until: float) -> None:
        """Go on with what `path` holds, or else the file of that name in `earlier`."""
        self.path, self.until, self.is_cut = path, until, False
        places = [path, *([earlier / path.name] if earlier else [])]
        texts = [place.read_text(encoding="utf-8") for place in places if place.is_file()]
        self.found: dict[str, Any] = json.loads(texts[0]) if texts else {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what has passed."""
        items[:] = [i for i in items if self.found.get(i.nodeid, {}).get("outcome") != "passed"]

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Begin nothing when the time is over."""
        if time.time() > self.until:
            self.is_cut = True
            item.session.shouldstop = "the time is over"
            pytest.skip("the time is over")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write the outcome of a test down."""
        if self.is_cut or (report.when != "call" and report.passed):
            return
        words = "" if report.passed else str(report.longrepr)[-1500:]
        self.found[report.nodeid] = {
            "outcome": report.outcome, "seconds": round(report.duration, 1), "said": words,
        }  # fmt: skip
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.found, indent=1), encoding="utf-8")
        partial.replace(self.path)


def main() -> int:
    """Run the tests; 0 if all have passed, 75 if the line must run again, 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("line", choices=("tests",))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--tiny", action="store_true", help="run their bodies on the CPU")
    parser.add_argument("--earlier", type=Path)
    asked = parser.parse_args()
    if asked.tiny:
        os.environ["FTLEVEL_GPU_TESTS"] = "cpu"
    notes = Notes(asked.out / "tests.json", asked.earlier, asked.until)
    places = PLACES[:1] if asked.tiny else PLACES
    pytest.main(
        ["-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", "--rootdir", str(TREE), *places],
        plugins=[notes],
    )
    outcomes = [note["outcome"] for note in notes.found.values()]
    print(f"{notes.path}: {outcomes.count('passed')} passed, {outcomes.count('failed')} failed, "
          f"{outcomes.count('skipped')} skipped"
          f"{'; cut off: the same line again goes on' if notes.is_cut else ''}")  # fmt: skip
    return 75 if notes.is_cut else int("failed" in outcomes or not outcomes)


if __name__ == "__main__":
    raise SystemExit(main())
