"""Stress ftlevel with kills, signals, damaged files and full disks, and print one table.

    make torture                                  every row at its full count
    python scripts/torture.py --only kill disk    some rows
    python scripts/torture.py --share 0.05        a twentieth of each count
    python scripts/torture.py --sample            a few cases, as the tests do
    python scripts/torture.py --minutes 5         cases started within five minutes per row
    python scripts/torture.py --seed 7 --jobs 2   another seed; two rows in parallel

The printed seed determines every row, except for moments measured in time. A case is bad (a
traceback, a wrong exit code, a run that cannot resume), silent (a wrong result at exit 0), hang (20
seconds beyond a run's own time), outside (a file written outside of the run), or good. Exit code 1
if any case is not good. --log writes one line per case.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # tiny models

Row = Callable[..., Iterator[object]]


@dataclass(frozen=True)
class Entry:
    """A row of the table; `function_path` is module:function, `sample` its cases in tests."""

    name: str
    title: str
    count: int
    sample: int
    function_path: str


ENTRIES = (
    Entry("kill", "kill -9 at any moment, then --resume", 200, 1, "kills:kill_at_any_moment"),
    Entry("late", "kill -9 after the last checkpoint", 50, 0, "kills:kill_late"),
    Entry("plateau", "kill -9 with reduce_lr_on_plateau", 10, 0, "kills:kill_with_plateau"),
    Entry("signals", "SIGINT, SIGTERM, SIGHUP in every command", 80, 0, "signals:signal_commands"),
    Entry("damage", "a damaged file of the newest checkpoint, or of all", 110, 0,
          "damage:damage_checkpoints"),
    Entry("state", "a damaged file of the run beside its checkpoints", 30, 1,
          "damage:damage_state"),
    Entry("cache", "damaged prepared rows", 100, 0, "damage:damage_cache"),
    Entry("disk", "a full disk", 60, 1, "disk:fill_disk"),
    Entry("overwrite", "--overwrite of what is not ours, or is in use", 30, 2, "owning:overwrite"),
    Entry("strangers", "files of strangers: code, links, servers, bombs", 108, 0,
          "strangers:strangers"),
    Entry("secrets", "tokens in the environment", 6, 1, "owning:look_for_secrets"),
)  # fmt: skip


def main() -> int:
    """Run the rows and print their table; return 1 if a case is not good."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], choices=[e.name for e in ENTRIES])
    parser.add_argument("--share", type=float, default=1.0, help="share of each count")
    parser.add_argument("--sample", action="store_true", help="the sample that tests run")
    parser.add_argument("--seed", type=int, default=None, help="default: random, printed")
    parser.add_argument("--jobs", type=int, default=1, help="parallel rows")
    parser.add_argument("--minutes", type=float, default=float("inf"),
                        help="start no case of a row after so many minutes")  # fmt: skip
    parser.add_argument("--log", type=Path, help="append every case to this file as it ends")
    parser.add_argument("--patience", type=float, default=120.0,
                        help="seconds a run may take (on a quiet machine it takes 2)")  # fmt: skip
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else int.from_bytes(os.urandom(4), "big")
    by_name = {entry.name: entry for entry in ENTRIES}
    entries = [by_name[name] for name in args.only] or list(ENTRIES)
    if args.sample:
        entries = [e for e in entries if e.sample]
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    print(f"seed {seed}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as root:
        cases = _run_all(entries, args, seed, Path(root))
    return _print_table(entries, cases, time.monotonic() - start)


def _run_all(
    entries: list[Entry], args: argparse.Namespace, seed: int, root: Path
) -> dict[str, list[dict[str, str]]]:
    """Return the cases of each row; rows run in separate processes, several in parallel."""
    from torture_rows.lab import create_template

    template = create_template(root)
    running: dict[int, Entry] = {}
    waiting, cases = list(entries), {}
    while waiting or running:
        while waiting and len(running) < args.jobs:
            entry = waiting.pop(0)
            pid = os.fork()
            if pid == 0:
                os._exit(_run_row(entry, args, seed, root, template))
            running[pid] = entry
        pid, _ = os.wait()
        entry = running.pop(pid)
        text = (root / f"{entry.name}.jsonl").read_text()
        cases[entry.name] = [json.loads(line) for line in text.splitlines()]
    return cases


def _run_row(entry: Entry, args: argparse.Namespace, seed: int, root: Path, template: Any) -> int:
    """Run one row and write its cases; an error of the row itself is a bad case."""
    import traceback

    from torture_rows.lab import BAD, Case, new_lab

    module, _, function = entry.function_path.partition(":")
    row = getattr(importlib.import_module(f"torture_rows.{module}"), function)
    count = entry.sample if args.sample else max(1, round(entry.count * args.share))
    start = time.monotonic()
    log = args.log or Path(os.devnull)
    with (root / f"{entry.name}.jsonl").open("w") as file, log.open("a") as log_file:

        def record(case: Case) -> None:
            line = {"row": entry.name, "seed": seed, **asdict(case)}
            for output in (file, log_file):
                output.write(json.dumps(line) + "\n")
                output.flush()
            if case.verdict != "good":
                print(f"{entry.name}: {case.verdict}: {case.name}: {case.why}", flush=True)

        try:
            with new_lab(root / entry.name, seed, template) as lab:
                lab.patience = args.patience
                for case in row(lab, count):
                    record(case)
                    if time.monotonic() - start > 60 * args.minutes:
                        break
        except Exception:  # noqa: BLE001 - it is reported
            record(Case(BAD, "the row itself", traceback.format_exc()[-2000:]))
    print(f"{entry.name}: done in {time.monotonic() - start:,.0f} s", flush=True)
    return 0


def _print_table(
    entries: list[Entry], cases: dict[str, list[dict[str, str]]], seconds: float
) -> int:
    from torture_rows.lab import VERDICTS

    print("\n| row | cases | " + " | ".join(VERDICTS) + " | kinds of good |")
    print("|---|--:|" + "--:|" * len(VERDICTS) + "---|")
    is_good = True
    for entry in entries:
        row_cases = cases.get(entry.name, [])
        counts = Counter(case["verdict"] for case in row_cases)
        sums: Counter[str] = Counter()
        for case in row_cases:
            sums[case["verdict"]] += int(case.get("times", 1))
        kinds: Counter[str] = Counter()
        for case in (case for case in row_cases if case["verdict"] == "good"):
            kinds[case["kind"]] += int(case.get("times", 1))
        good_kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items()) if kind)
        verdict_counts = " | ".join(f"{sums[verdict]:,}" for verdict in VERDICTS)
        total = f"{sum(sums.values()):,} of {entry.count:,}"
        print(f"| {entry.title} | {total} | {verdict_counts} | {good_kinds} |")
        is_good &= set(counts) <= {"good"}
    print(f"\n{seconds / 60:,.1f} minutes")
    return 0 if is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
