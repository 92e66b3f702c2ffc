"""Run the tests that need a GPU; record each that passes, and skip it in a later run.

    python -m gpu.prove smoke|tests --out FOLDER --until TIME     (run by run.py of the kit)

FOLDER/smoke.json or tests.json maps each test to its outcome, seconds and last output.
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
TEST_PATHS = ("tests/gpu/test_smoke.py", "tests/gpu", "tests/unit/fast/attention/test_varlen.py")


class OutcomeRecorder:
    """A pytest plugin that saves outcomes to a file, and stops at a time limit."""

    def __init__(self, path: Path, earlier: Path | None, until: float) -> None:
        """Load the outcomes of `path`, or of the file with that name in `earlier`."""
        self.path, self.until, self.is_interrupted = path, until, False
        paths = [path, *([earlier / path.name] if earlier else [])]
        texts = [file.read_text(encoding="utf-8") for file in paths if file.is_file()]
        self.outcomes: dict[str, Any] = json.loads(texts[0]) if texts else {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Deselect tests that have passed."""
        items[:] = [i for i in items if self.outcomes.get(i.nodeid, {}).get("outcome") != "passed"]

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skip tests after the time limit."""
        if time.time() > self.until:
            self.is_interrupted = True
            item.session.shouldstop = "the time is over"
            pytest.skip("the time is over")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Save the outcome of a test."""
        if self.is_interrupted or (report.when != "call" and report.passed):
            return
        output = "" if report.passed else str(report.longrepr)[-1500:]
        self.outcomes[report.nodeid] = {
            "outcome": report.outcome, "seconds": round(report.duration, 1), "said": output,
        }  # fmt: skip
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.outcomes, indent=1), encoding="utf-8")
        partial.replace(self.path)


def main() -> int:
    """Run the tests; return 0 if all passed, 75 if the line must run again, 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("line", choices=("smoke", "tests"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--tiny", action="store_true", help="run the test bodies on the CPU")
    parser.add_argument("--earlier", type=Path)
    args = parser.parse_args()
    if args.tiny:
        os.environ["FTLEVEL_GPU_TESTS"] = "cpu"
    recorder = OutcomeRecorder(args.out / f"{args.line}.json", args.earlier, args.until)
    end = 1 if args.line == "smoke" else 2 if args.tiny else None
    options = ["-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", "--rootdir", str(TREE)]
    pytest.main([*options, *TEST_PATHS[:end]], plugins=[recorder])
    outcomes = [entry["outcome"] for entry in recorder.outcomes.values()]
    counts = ", ".join(f"{outcomes.count(o)} {o}" for o in ("passed", "failed", "skipped"))
    note = "; incomplete: run this line again" if recorder.is_interrupted else ""
    print(f"{recorder.path}: {counts}{note}")
    return 75 if recorder.is_interrupted else int("failed" in outcomes or not outcomes)


if __name__ == "__main__":
    raise SystemExit(main())
