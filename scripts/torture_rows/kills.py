"""kill -9 at any moment, once or twice, then `--resume`: the result equals an uninterrupted run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from torture_rows.lab import BAD, GOOD, HANG, SILENT, STEPS, Case, Lab, ProcessResult

from torture_rows.lab import ReferenceRun, certified, digest, leftovers  # isort: skip
from torture_rows.moments import killing


def judge(name: str, run: Path, result: ProcessResult, expected: str, kind: str = "") -> Case:
    """Return the case of a run that was resumed to its end."""
    if result.hung:
        return Case(HANG, name, result.last, kind)
    if result.code != 0 or result.is_raw:
        return Case(BAD, name, f"exit {result.code}: {result.err[-600:]}", kind)
    if digest(run) != expected:
        return Case(SILENT, name, f"another adapter or log than without a kill; {result.err}", kind)
    if leftover := leftovers(run):
        return Case(BAD, name, f"left behind: {leftover}", kind)
    return Case(GOOD, name, kind=kind)


def kill_at_any_moment(lab: Lab, count: int) -> Iterator[Case]:
    """Half before the first checkpoint; half by time; a quarter killed again on resume."""
    reference = lab.reference
    first_checkpoint, total = reference.course.certified[0], reference.course.total
    for index in range(count):
        run, early = lab.folder(), index % 2 == 0
        if index % 4 < 2:
            event = lab.random.randint(1, first_checkpoint if early else total)
            name = f"killed at file event {event:,} of {total:,}"
            lab.run(lab.training(run), killing(event))
        else:
            share = lab.random.uniform(0, 0.5 if early else 1.0)
            name = f"killed after {share:.3f} of its time"
            child = lab.start(lab.training(run))
            time.sleep(share * reference.seconds)
            child.kill()
            child.wait()
        kind = "later" if certified(run) else "before the first checkpoint"
        if lab.random.random() < 0.25:
            event = lab.random.randint(1, total)
            name += f", and resuming at {event:,}"
            lab.run(lab.training(run, "--resume"), killing(event))
        yield judge(name, run, lab.run(lab.training(run, "--resume")), reference.digest, kind)
        shutil.rmtree(run, ignore_errors=True)


def kill_late(lab: Lab, count: int) -> Iterator[Case]:
    """After the last checkpoint: while the adapter is saved and verified. Constant rate."""
    constant = ("--lr-scheduler-type", "constant")
    reference = ReferenceRun(lab, *constant)
    last_checkpoint, total = reference.course.certified[STEPS - 1], reference.course.total
    for _ in range(count):
        run = lab.folder()
        event = lab.random.randint(last_checkpoint + 1, total)
        lab.run(lab.training(run, *constant), killing(event))
        name = f"killed at file event {event:,} of {total:,}"
        result = lab.run(lab.training(run, *constant, "--resume"))
        yield judge(name, run, result, reference.digest)
        shutil.rmtree(run, ignore_errors=True)


def kill_with_plateau(lab: Lab, count: int) -> Iterator[Case]:
    """With a plateau schedule, whose state is not a function of the step."""
    plateau = ("--lr-scheduler-type", "reduce_lr_on_plateau", "--set", "train.lr_scheduler_kwargs="
               "{patience: 0, factor: 0.5, threshold: 0.5}", "--eval-steps", "2",
               "--set", "data.validation_split=0.2")  # fmt: skip
    reference = ReferenceRun(lab, *plateau)
    for _ in range(count):
        run = lab.folder()
        event = lab.random.randint(reference.course.certified[0], reference.course.certified[-1])
        lab.run(lab.training(run, *plateau), killing(event))
        result = lab.run(lab.training(run, *plateau, "--resume"))
        yield judge(f"killed at file event {event:,}", run, result, reference.digest)
        shutil.rmtree(run, ignore_errors=True)
