"""Two processes: a killed rank, a killed launcher, signals; and what an unbroken run gives."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from torture_rows.lab import BAD, GOOD, HANG, SILENT, Case, Child, Lab, certified, digest

from torture_rows.lab import forking_ranks  # isort: skip

_SECONDS = 30.0  # until a dead rank, or launcher, has ended all
WAYS = ("a rank is killed", "the launcher is killed", "SIGTERM", "SIGINT", "equal to accumulation",
        "a rank is killed, and started again")  # fmt: skip
METHODS = ("lora", "ia3", "adapter", "prefix", "ln-tuning")


def break_processes(lab: Lab, count: int) -> Iterator[Case]:
    """Whatever ends them, no process stays, and the run goes on as the one nobody broke off."""
    two = ("--num-processes", "2", "--batch-size", "2")
    dropout = ("--lora-dropout", "0.1")
    whole = _finish(lab, lab.folder(), *two, *dropout)
    for number in range(count):
        way, run = WAYS[number % len(WAYS)], lab.folder()
        if way == "equal to accumulation":
            yield _equal(lab, METHODS[number // len(WAYS) % len(METHODS)], two)
            continue
        restarts = ("--max-restarts", "2") if "again" in way else ()
        launcher = _start(lab, run, *two, *dropout, *restarts)
        ranks = _ranks(launcher, run, lab)
        lab_moment = lab.random.uniform(0, 6)
        time.sleep(lab_moment)
        victim = lab.random.randrange(2)
        words = f"{way} after {lab_moment:.1f} s"
        number_of = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.get(way)
        if not ranks:  # it was over before
            words += ", too late"
        elif number_of is not None:
            launcher.kill(number_of)
        elif "rank" in way:
            with contextlib.suppress(psutil.NoSuchProcess):  # it was over meanwhile
                ranks[victim].kill()
        else:
            launcher.kill()
        yield _judge(lab, words, way, launcher, ranks, run, (*two, *dropout), whole)
        shutil.rmtree(run, ignore_errors=True)


def _judge(
    lab: Lab,
    words: str,
    way: str,
    launcher: Child,
    ranks: list[psutil.Process],
    run: Path,
    more: tuple[str, ...],
    whole: str,
) -> Case:
    patience = lab.patience * 3 if "again" in way else _SECONDS
    deadline = time.monotonic() + patience
    ended = launcher.wait(patience)
    if ended.hung:
        return Case(HANG, words, "the launcher stays")
    while alive := [r for r in ranks if r.is_running() and r.status() != psutil.STATUS_ZOMBIE]:
        if time.monotonic() > deadline:
            for rank in alive:
                rank.kill()
            return Case(HANG, words, "ranks stay")
        time.sleep(0.1)
    codes = {"SIGTERM": (143, 0), "SIGINT": (130, 0), "the launcher is killed": (-9, 0),
             "a rank is killed, and started again": (0,)}  # fmt: skip
    if ended.code not in codes.get(way, (1, 0)) or "Traceback" in ended.err:
        return Case(BAD, words, f"exit {ended.code}: {ended.err[-500:]}")
    if way == "a rank is killed" and ended.code == 1 and "was killed" not in ended.err:
        return Case(BAD, words, f"the rank is not named: {ended.err[-300:]}")
    kind = "went on" if certified(run) else "begun anew"
    if "again" not in way:
        again = _start(lab, run, *more, "--resume").wait(lab.patience * 3)
        if again.code != 0:
            return Case(BAD, words, f"resume: exit {again.code}: {again.err[-500:]}")
    return Case(GOOD if digest(run) == whole else SILENT, words, "another adapter", kind)


def _equal(lab: Lab, method: str, two: tuple[str, ...]) -> Case:
    """Two processes are one with twice the accumulation, bit for bit, on the plain step."""
    plain = ("--no-fast", "--method", method)
    of_two = _finish(lab, lab.folder(), *two, *plain)
    of_one = _finish(
        lab, lab.folder(), "--batch-size", "2", "--gradient-accumulation-steps", "2", *plain
    )
    return Case(GOOD if of_two == of_one else SILENT, f"{method}: equal", f"{of_two} {of_one}",
                "equal")  # fmt: skip


def _finish(lab: Lab, run: Path, *more: str) -> str:
    ended = _start(lab, run, *more).wait(lab.patience * 5)
    if ended.code != 0:
        raise RuntimeError(ended.err)
    found = digest(run)
    shutil.rmtree(run)
    return found


def _start(lab: Lab, run: Path, *more: str) -> Child:
    given = lab.training(run)
    at = given.index("--lora-dropout")
    return lab.start([*given[:at], *given[at + 2 :], *more], forking_ranks)


def _ranks(launcher: Child, run: Path, lab: Lab) -> list[psutil.Process]:
    """Return the processes of a run that has begun."""
    deadline = time.monotonic() + lab.patience * 3
    here = psutil.Process(launcher.pid)
    while not (run / "checkpoints").exists() and here.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            raise RuntimeError("the processes do not begin")
        time.sleep(0.02)
    return list(here.children()) if here.status() != psutil.STATUS_ZOMBIE else []
