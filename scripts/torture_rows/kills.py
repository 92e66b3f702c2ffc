"""kill -9 at any moment, once or twice, then `--resume`: the result is that of one run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from torture_rows.lab import BAD, GOOD, HANG, SILENT, STEPS, Case, Ended, Lab

from torture_rows.lab import certified, digest, leftovers  # isort: skip
from torture_rows.moments import Course, counting, killing, read_course


class Whole:
    """The run that nobody breaks off.

    Attributes:
        digest: of what it trained and logged.
        course: its file events.
        seconds: that it took.
    """

    def __init__(self, lab: Lab, *more: str) -> None:
        run, course = lab.folder(), lab.root / "course.json"
        began = time.monotonic()
        ended = lab.run(lab.training(run, *more), counting(course), seconds=200)
        if ended.code != 0:
            raise RuntimeError(ended.err)
        self.seconds = time.monotonic() - began
        self.digest = digest(run)
        self.course: Course = read_course(course)
        shutil.rmtree(run)


def judge(name: str, run: Path, ended: Ended, whole: str, kind: str = "") -> Case:
    """Judge a run that went on to its end."""
    if ended.hung:
        return Case(HANG, name, ended.last, kind)
    if ended.code != 0 or ended.is_raw:
        return Case(BAD, name, f"exit {ended.code}: {ended.err[-600:]}", kind)
    if digest(run) != whole:
        return Case(SILENT, name, f"another adapter or log than without a kill; {ended.err}", kind)
    if left := leftovers(run):
        return Case(BAD, name, f"left behind: {left}", kind)
    return Case(GOOD, name, kind=kind)


def kill_at_any_moment(lab: Lab, count: int) -> Iterator[Case]:
    """Half before the first checkpoint; half by the clock; a quarter killed again as it resumes."""
    whole = Whole(lab)
    first, total = whole.course.certified[0], whole.course.total
    for number in range(count):
        run, early = lab.folder(), number % 2 == 0
        if number % 4 < 2:
            event = lab.random.randint(1, first if early else total)
            name = f"killed at file event {event:,} of {total:,}"
            lab.run(lab.training(run), killing(event))
        else:
            share = lab.random.uniform(0, 0.5 if early else 1.0)
            name = f"killed after {share:.3f} of its time"
            child = lab.start(lab.training(run))
            time.sleep(share * whole.seconds)
            child.kill()
            child.wait()
        kind = "later" if certified(run) else "before the first checkpoint"
        if lab.random.random() < 0.25:
            event = lab.random.randint(1, total)
            name += f", and resuming at {event:,}"
            lab.run(lab.training(run, "--resume"), killing(event))
        yield judge(name, run, lab.run(lab.training(run, "--resume")), whole.digest, kind)
        shutil.rmtree(run, ignore_errors=True)


def kill_late(lab: Lab, count: int) -> Iterator[Case]:
    """After the last checkpoint: while the adapter is saved, proved, summed up. Constant rate."""
    constant = ("--lr-scheduler-type", "constant")
    whole = Whole(lab, *constant)
    last, total = whole.course.certified[STEPS - 1], whole.course.total
    for _ in range(count):
        run = lab.folder()
        event = lab.random.randint(last + 1, total)
        lab.run(lab.training(run, *constant), killing(event))
        name = f"killed at file event {event:,} of {total:,}"
        ended = lab.run(lab.training(run, *constant, "--resume"))
        yield judge(name, run, ended, whole.digest)
        shutil.rmtree(run, ignore_errors=True)


def kill_with_plateau(lab: Lab, count: int) -> Iterator[Case]:
    """With a schedule that waits for evaluations, whose state is no function of the step."""
    plateau = ("--lr-scheduler-type", "reduce_lr_on_plateau", "--set", "train.lr_scheduler_kwargs="
               "{patience: 0, factor: 0.5, threshold: 0.5}", "--eval-steps", "2",
               "--set", "data.validation_split=0.2")  # fmt: skip
    whole = Whole(lab, *plateau)
    for _ in range(count):
        run = lab.folder()
        event = lab.random.randint(whole.course.certified[0], whole.course.certified[-1])
        lab.run(lab.training(run, *plateau), killing(event))
        ended = lab.run(lab.training(run, *plateau, "--resume"))
        yield judge(f"killed at file event {event:,}", run, ended, whole.digest)
        shutil.rmtree(run, ignore_errors=True)
